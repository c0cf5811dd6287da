"""Masked AdamW with 8-bit moments: the step of masked_adamw.py between a dequantisation and a quantisation.

    m, v         = dequantize(exp_avg), dequantize(exp_avg_sq)          blockwise.py
    p, m, v      = step(p, m, v, g) in fp32                             masked_adamw.py
    exp_avg, exp_avg_sq = quantize(m), quantize(v)

as ``bitsandbytes.optim.AdamW8bit`` does with dense parameters (Dettmers et al. 2022, arXiv 2110.02861): the
signed map for ``exp_avg``, the unsigned for ``exp_avg_sq``, blocks of 256 compact positions. The two moments
take 2 bytes and a 32nd of a byte per entry instead of 8. A Triton program owns whole blocks, so that a block's
new scale never leaves it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blockwise import (
    BLOCK_SIZE,
    Blockwise,
    check_blockwise,
    codebook,
    dequantize_blockwise,
    load_blockwise,
    quantize_blockwise,
    quantize_blockwise_ref,
    store_blockwise,
)
from .dispatch import BenchCase, Impl, check_vector, launch, locate, run_args, use_triton
from .hyper import AdamWHyper
from .masked_adamw import (
    Rounding,
    adamw_update,
    check_operands,
    check_step,
    masked_adamw,
    masked_adamw_ref,
    store_weight,
)
from .rounding import seed_keys
from .runs import Runs

TILE = 2 * BLOCK_SIZE
"""Entries per Triton program: each of 128 threads handles 4, one 16-byte vector of fp32, without spills."""


def masked_adamw_8bit_ref(
    weight: Tensor,
    runs: Runs,
    master: Tensor | None,
    grad: Tensor,
    exp_avg: Blockwise,
    exp_avg_sq: Blockwise,
    **hyper: float,
) -> None:
    """The formula in float64: explicit indices, then comparison with all 256 values."""
    m = dequantize_blockwise(exp_avg, signed=True).double()
    v = dequantize_blockwise(exp_avg_sq, signed=False).double()
    masked_adamw_ref(weight, runs, master, grad, m, v, **hyper)  # type: ignore[arg-type]
    for state, moment, signed in ((exp_avg, m, True), (exp_avg_sq, v, False)):
        new = quantize_blockwise_ref(moment, signed)
        state.codes.copy_(new.codes)
        state.absmax.copy_(new.absmax)


@triton.jit(do_not_specialize=["key_1", "key_2"])
def _masked_adamw_8bit_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,
    master_ptr,  # None where the weight is the master copy
    grad_ptr,
    codes_1_ptr,
    absmax_1_ptr,
    codes_2_ptr,
    absmax_2_ptr,
    values_1_ptr,
    midpoints_1_ptr,
    guess_1_ptr,
    values_2_ptr,
    midpoints_2_ptr,
    guess_2_ptr,
    step_size,
    correction2_sqrt,
    grad_scale,  # number, or pointer to a scalar
    decay,
    weight1,
    beta2,
    weight2,
    eps,
    key_1,
    key_2,
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    SCALE_IS_POINTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    local, position, valid = locate(units_ptr, num_units, num_entries, block, base, skip, TILE, 0, False)
    blocks = tl.program_id(0).to(tl.int64) * (TILE // BLOCK_SIZE) + tl.arange(0, TILE // BLOCK_SIZE)
    blocks_valid = blocks * BLOCK_SIZE < num_entries
    if SCALE_IS_POINTER:
        grad_scale = tl.load(grad_scale).to(tl.float32)
    g = tl.load(grad_ptr + position, mask=valid, other=0.0).to(tl.float32) * grad_scale
    if master_ptr is None:
        p = tl.load(weight_ptr + local, mask=valid, other=0.0).to(tl.float32)
    else:
        p = tl.load(master_ptr + position, mask=valid, other=0.0)
    m = load_blockwise(codes_1_ptr, absmax_1_ptr, values_1_ptr, position, valid, blocks, blocks_valid)
    v = load_blockwise(codes_2_ptr, absmax_2_ptr, values_2_ptr, position, valid, blocks, blocks_valid)
    p, m, v = adamw_update(p, m, v, g, step_size, correction2_sqrt, decay, weight1, beta2, weight2, eps)
    if master_ptr is not None:
        tl.store(master_ptr + position, p, mask=valid)
    store_weight(weight_ptr, local, p, valid, base, key_1, key_2, STOCHASTIC)
    store_blockwise(
        m, codes_1_ptr, absmax_1_ptr, midpoints_1_ptr, guess_1_ptr, position, valid, blocks, blocks_valid
    )
    store_blockwise(
        v, codes_2_ptr, absmax_2_ptr, midpoints_2_ptr, guess_2_ptr, position, valid, blocks, blocks_valid
    )


def masked_adamw_8bit(
    weight: Tensor,
    runs: Runs,
    master: Tensor | None,
    grad: Tensor,
    exp_avg: Blockwise,
    exp_avg_sq: Blockwise,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    impl: Impl = "auto",
) -> None:
    """Takes one step in place on ``weight``, ``master`` and the codes and absmax of both moments.

    One pass over the entries on a GPU; on a CPU both moments exist in fp32 while the step is taken.

    Args:
        weight: [numel] bf16, fp16 or fp32 local slice; only the support is written.
        runs: the support, n entries.
        master, grad, grad_scale, rounding, seed, impl: as in `masked_adamw`.
        exp_avg: n entries of the signed map, at first `Blockwise.zeros`.
        exp_avg_sq: n entries of the unsigned map.
        step: 1-based step, of all entries.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters break a rule above.
    """
    check_vector("weight", weight, runs.numel, (torch.bfloat16, torch.float16, torch.float32))
    check_operands(weight, runs, master, grad, torch.float32, rounding)
    check_blockwise("exp_avg", exp_avg, runs.num_entries)
    check_blockwise("exp_avg_sq", exp_avg_sq, runs.num_entries)
    check_step(step, grad_scale, runs)
    if isinstance(step, Tensor):
        raise ValueError("step: a tensor of ages has no 8-bit path; pass the number of this step")
    hyper = AdamWHyper(lr, beta1, beta2, eps, weight_decay)
    grad_scale = grad_scale.float() if isinstance(grad_scale, Tensor) else float(grad_scale)
    operands = [weight, grad, *exp_avg, *exp_avg_sq, runs.units]
    operands += [tensor for tensor in (master, grad_scale) if isinstance(tensor, Tensor)]
    if not use_triton(impl, *operands):
        m, v = dequantize_blockwise(exp_avg, signed=True), dequantize_blockwise(exp_avg_sq, signed=False)
        options = {"step": step, "grad_scale": grad_scale, "rounding": rounding, "seed": seed, "impl": impl}
        masked_adamw(weight, runs, master, grad, m, v, **vars(hyper), **options)  # type: ignore[arg-type]
        quantize_blockwise(m, signed=True, out=exp_avg)
        quantize_blockwise(v, signed=False, out=exp_avg_sq)
    elif runs.num_entries:
        scalars = (hyper.decay, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps)
        launch(
            _masked_adamw_8bit_kernel,
            triton.cdiv(runs.num_entries, TILE),
            weight.device,
            *(weight, master, grad, *exp_avg, *exp_avg_sq),
            *(*codebook(True, weight.device), *codebook(False, weight.device)),
            *(hyper.step_size(step), hyper.correction2_sqrt(step), grad_scale, *map(float, scalars)),
            *seed_keys(seed),
            *run_args(runs),
            SCALE_IS_POINTER=isinstance(grad_scale, Tensor),
            STOCHASTIC=rounding == "stochastic" and weight.dtype == torch.bfloat16,
            TILE=TILE,
            BLOCK_SIZE=BLOCK_SIZE,
        )


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """One step with an fp32 master copy on a random support."""
    runs = Runs.random(numel, block, density, device=device)
    weight = torch.randn(numel, device=device).to(dtype)
    master, grad = torch.rand(2, runs.num_entries, device=device).unbind()
    moments = [Blockwise.zeros(runs.num_entries, device) for _ in range(2)]
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    num_bytes = runs.num_entries * (3 * 4 + 4 + weight.element_size()) + runs.units.nbytes
    num_bytes += 4 * moments[0].absmax.nbytes
    state = (weight, runs, master, grad, *moments)
    return BenchCase(lambda: masked_adamw_8bit(*state, **hyper, step=10), num_bytes)  # type: ignore[arg-type]
