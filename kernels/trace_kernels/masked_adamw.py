"""Masked AdamW: one decoupled-decay Adam step on the support of a local slice, with write-back.

    p <- p (1 - lr wd);   m <- m + (1 - b1) (g - m);   v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    weight[local(p)] <- round(p)

(Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.) ``p`` is the compact master copy, or the weight
itself. Operations and their order are those of ``torch.optim.AdamW(foreach=False, capturable=False)``: at
full density the torch path equals it bit for bit in fp32 and fp64. The Triton kernel rounds where torch
rounds: a fused multiply-add in the two moments and nowhere else, square root and division correctly
rounded. The C++ path does the same, bit for bit. Their moments have the bits of the torch path on a CPU with
FMA; their weights agree with it to 2 ulp (rtol 2.4e-7), since torch's vectorised square root is not correctly
rounded on a CPU. Elements outside the support are never written.

[Note: bf16 second moment] One step lets v decay by 1 - b2, usually a thousandth. bf16 has 8 significant bits,
so half of its last digit is between 2^-9 and 2^-8 of v, which is more: rounded to nearest, v would never fall
again, nor grow beyond a third of g^2. Rounded stochastically it follows the formula on average. The first
moment moves by a tenth in a step, and is rounded to nearest.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .compact import compact_sumsq
from .dispatch import BenchCase, Impl, check_vector, choose, launch, locate, plan, run_args
from .hyper import AdamWHyper
from .rounding import random_word, round_bf16, seed_keys, stochastic_bf16, truncate_bf16
from .runs import Runs

Rounding = Literal["nearest", "stochastic"]


class Operands(NamedTuple):
    """What a step reads and writes; all but ``weight`` is compact."""

    weight: Tensor
    runs: Runs
    master: Tensor | None
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What the step is computed in."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


def masked_adamw_ref(
    weight: Tensor,
    runs: Runs,
    master: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    grad_scale: float | Tensor = 1.0,
) -> None:
    """The formula by explicit indices, in float64, rounded to nearest once at the end."""
    indices = runs.indices()
    p, g = (weight[indices] if master is None else master).double(), grad.double() * grad_scale
    age = step.double() if isinstance(step, Tensor) else torch.tensor(float(step), dtype=torch.float64)
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    denom = (v / (1 - beta2**age)).sqrt() + eps
    p = p * (1 - lr * weight_decay) - lr * (m / (1 - beta1**age)) / denom
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if master is not None:
        master.copy_(p)
    weight[indices] = p.to(weight.dtype)


@triton.jit
def adamw_update(p, m, v, g, step_size, correction2_sqrt, decay, weight1, beta2, weight2, eps):  # type: ignore[no-untyped-def]
    """The formula on fp32 tiles: the new ``p``, ``m`` and ``v``."""
    p = p * decay
    far = weight1 >= 0.5  # torch's lerp starts from the nearer end
    m = tl.fma(tl.where(far, weight1 - 1, weight1) + tl.zeros_like(m), g - m, tl.where(far, g, m))
    v = tl.fma(weight2 * g, g, v * beta2)
    denom = tl.div_rn(tl.sqrt_rn(v), correction2_sqrt + tl.zeros_like(v)) + eps
    return p - tl.div_rn(step_size * m, denom), m, v


@triton.jit
def store_weight(weight_ptr, local, p, valid, base, key_1, key_2, STOCHASTIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes fp32 ``p`` to the weight, rounded to its dtype."""
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        p = (
            truncate_bf16(p, random_word(local + base, key_1, key_2) & 0xFFFF)
            if STOCHASTIC
            else round_bf16(p)
        )
    tl.store(weight_ptr + local, p, mask=valid)


@triton.jit
def update_tile(  # type: ignore[no-untyped-def]
    weight_ptr,
    master_ptr,  # None where the weight is the master copy
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    local,
    position,
    valid,
    base,
    step_size,
    correction2_sqrt,
    grad_scale,
    decay,
    weight1,
    beta2,
    weight2,
    eps,
    key_1,
    key_2,
    STOCHASTIC: tl.constexpr,
):
    """One step on the entries that `locate` found."""
    g = tl.load(grad_ptr + position, mask=valid, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg_ptr + position, mask=valid, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + position, mask=valid, other=0.0).to(tl.float32)
    if master_ptr is None:
        p = tl.load(weight_ptr + local, mask=valid, other=0.0).to(tl.float32)
    else:
        p = tl.load(master_ptr + position, mask=valid, other=0.0)

    p, m, v = adamw_update(p, m, v, g, step_size, correction2_sqrt, decay, weight1, beta2, weight2, eps)
    if exp_avg_ptr.dtype.element_ty == tl.bfloat16:
        m = round_bf16(m)
    if exp_avg_sq_ptr.dtype.element_ty == tl.bfloat16:
        v = truncate_bf16(v, random_word(local + base, key_1, key_2) >> 16)
    tl.store(exp_avg_ptr + position, m, mask=valid)
    tl.store(exp_avg_sq_ptr + position, v, mask=valid)
    if master_ptr is not None:
        tl.store(master_ptr + position, p, mask=valid)
    store_weight(weight_ptr, local, p, valid, base, key_1, key_2, STOCHASTIC)


@triton.jit(do_not_specialize=["key_1", "key_2"])
def _masked_adamw_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,
    master_ptr,  # None where the weight is the master copy
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    age_ptr,  # None where all entries share one step
    step_size,  # number, or pointer to the table by age
    correction2_sqrt,  # number, or pointer to the table by age
    last_age,
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
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    local, position, valid = locate(
        units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    if SCALE_IS_POINTER:
        grad_scale = tl.load(grad_scale).to(tl.float32)
    if age_ptr is not None:
        age = tl.minimum(tl.load(age_ptr + position, mask=valid, other=1), last_age)
        step_size = tl.load(step_size + age, mask=valid, other=0.0)
        correction2_sqrt = tl.load(correction2_sqrt + age, mask=valid, other=1.0)
    update_tile(
        weight_ptr,
        master_ptr,
        grad_ptr,
        exp_avg_ptr,
        exp_avg_sq_ptr,
        local,
        position,
        valid,
        base,
        step_size,
        correction2_sqrt,
        grad_scale,
        decay,
        weight1,
        beta2,
        weight2,
        eps,
        key_1,
        key_2,
        STOCHASTIC,
    )


def masked_adamw(
    weight: Tensor,
    runs: Runs,
    master: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    grad_scale: float | Tensor = 1.0,
    rounding: Rounding = "nearest",
    seed: int = 0,
    squares: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Takes one step in place on ``weight``, ``master``, ``exp_avg`` and ``exp_avg_sq``.

    Args:
        weight: [numel] bf16, fp16, fp32 or fp64 local slice; only the support is written.
        runs: the support, n entries.
        master: [n] fp32 (fp64 for an fp64 ``weight``), or None: the weight is then its own master copy, which
            a half-precision weight can only be with stochastic rounding (small updates would be lost).
        grad: [n] any float dtype; not changed.
        exp_avg, exp_avg_sq: [n] moments, fp32 (fp64 for an fp64 ``weight``) or, computed in fp32, bf16;
            a bf16 ``exp_avg_sq`` is rounded stochastically ([Note: bf16 second moment]).
        step: 1-based step, or int32 [n] ages, 1 on an entry's first step (hyper.py, [Note: age]).
        grad_scale: factor on ``grad``: a float, or a 0-dim tensor on the same device (no synchronisation).
        rounding: how fp32 becomes a bf16 ``weight``; fp32 and fp64 are stored exactly.
        seed: of stochastic rounding, of a weight and of a bf16 ``exp_avg_sq``; use another one for each parameter
            and step. The bits depend on it and on the entries' global indices alone, not on the sharding.
        squares: 0-dim float64 on the same device, to which the sum of squares of ``grad``, unscaled, is added.
        impl: see dispatch.py.

    Raises:
        ValueError: shapes, dtypes or hyper-parameters break a rule above.
    """
    state = Operands(weight, runs, master, grad, exp_avg, exp_avg_sq)
    hyper = AdamWHyper(lr, beta1, beta2, eps, weight_decay)
    check_state(state, rounding)
    check_step(step, grad_scale, runs)
    if squares is not None:
        _check_squares(squares, grad)
    grad_scale = grad_scale.to(state.dtype) if isinstance(grad_scale, Tensor) else float(grad_scale)
    operands = [weight, grad, exp_avg, exp_avg_sq, runs.units]
    operands += [t for t in (master, step, grad_scale) if isinstance(t, Tensor)]
    stochastic = rounding == "stochastic" and weight.dtype == torch.bfloat16
    path = choose(impl, *operands)
    if path == "cpp":
        _step_cpp(state, hyper, step, grad_scale, stochastic, seed, squares)
        return
    if squares is not None:
        squares.add_(compact_sumsq(grad))
    if path == "torch":
        _step_torch(state, hyper, step, grad_scale, stochastic, seed)
    elif runs.num_entries:
        _step_triton(state, hyper, step, grad_scale, stochastic, seed)


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """One step with an fp32 master copy on a random support."""
    runs = Runs.random(numel, block, density, device=device)
    weight = torch.randn(numel, device=device).to(dtype)
    master, grad, exp_avg, exp_avg_sq = torch.rand(4, runs.num_entries, device=device).unbind()
    state = (weight, runs, master, grad, exp_avg, exp_avg_sq)
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    num_bytes = runs.num_entries * (7 * 4 + weight.element_size()) + runs.units.nbytes
    return BenchCase(lambda: masked_adamw(*state, **hyper, step=10), num_bytes)  # type: ignore[arg-type]


def _step_triton(
    state: Operands,
    hyper: AdamWHyper,
    step: int | Tensor,
    grad_scale: float | Tensor,
    stochastic: bool,
    seed: int,
) -> None:
    corrections: tuple[float | Tensor, float | Tensor, int]
    if isinstance(step, Tensor):
        ages, tables = step, hyper.tables(step.device, torch.float32)
        corrections = (*tables, tables[0].numel() - 1)
    else:
        ages, corrections = None, (hyper.step_size(step), hyper.correction2_sqrt(step), 0)
    scalars = (hyper.decay, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps)
    num_programs, tile = plan(state.runs)
    launch(
        _masked_adamw_kernel,
        num_programs,
        state.weight.device,
        *(state.weight, state.master, state.grad, state.exp_avg, state.exp_avg_sq, ages),
        *(*corrections, grad_scale, *map(float, scalars)),
        *seed_keys(seed),
        *run_args(state.runs),
        SCALE_IS_POINTER=isinstance(grad_scale, Tensor),
        STOCHASTIC=stochastic,
        **tile,
    )


def _step_cpp(
    state: Operands,
    hyper: AdamWHyper,
    step: int | Tensor,
    grad_scale: float | Tensor,
    stochastic: bool,
    seed: int,
    squares: Tensor | None,
) -> None:
    by_age, corrections = None, (0.0, 0.0)
    if isinstance(step, Tensor):
        by_age = (step, *hyper.tables(step.device, torch.float32))
    else:
        corrections = (hyper.step_size(step), hyper.correction2_sqrt(step))
    rates = (float(grad_scale), hyper.decay, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps)
    scalars = (*corrections, *rates)
    cpu.adamw(
        *state, by_age=by_age, stochastic=stochastic, keys=seed_keys(seed), scalars=scalars, squares=squares
    )


def _step_torch(
    state: Operands,
    hyper: AdamWHyper,
    step: int | Tensor,
    grad_scale: float | Tensor,
    stochastic: bool,
    seed: int,
) -> None:
    weight, runs, master = state.weight, state.runs, state.master
    for piece in runs.pieces():
        span = slice(piece.start, piece.stop)
        p = (piece.gather(weight) if master is None else master[span]).to(state.dtype)
        g, m, v = (t[span].to(state.dtype) for t in (state.grad, state.exp_avg, state.exp_avg_sq))
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            g = g * grad_scale
        if hyper.weight_decay != 0:
            p.mul_(hyper.decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        if isinstance(step, Tensor):
            step_size, correction2_sqrt = hyper.tables(step.device, state.dtype)
            age = step[span].clamp(max=step_size.numel() - 1)
            denom = v.sqrt().div_(correction2_sqrt.index_select(0, age)).add_(hyper.eps)
            p.sub_(step_size.index_select(0, age).mul_(m).div_(denom))
        else:
            denom = v.sqrt().div_(hyper.correction2_sqrt(step)).add_(hyper.eps)
            p.addcdiv_(m, denom, value=-hyper.step_size(step))
        if state.exp_avg.dtype != state.dtype:
            state.exp_avg[span].copy_(m)
        if state.exp_avg_sq.dtype != state.dtype:
            places = piece.indices(weight.device) + runs.base
            state.exp_avg_sq[span].copy_(stochastic_bf16(v.float(), places, seed, upper=True))
        if stochastic:
            p = stochastic_bf16(p, piece.indices(weight.device) + runs.base, seed)
        piece.scatter(weight, p.to(weight.dtype))


def check_state(state: Operands, rounding: Rounding) -> None:
    """Raises ValueError unless the operands suit each other."""
    for name, moment in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
        check_vector(name, moment, state.runs.num_entries, (state.dtype, torch.bfloat16))
    check_operands(state.weight, state.runs, state.master, state.grad, state.dtype, rounding)


def _check_squares(squares: Tensor, grad: Tensor) -> None:
    if squares.dim() != 0 or squares.dtype != torch.float64 or squares.device != grad.device:
        raise ValueError(
            f"squares: {squares.dtype}, shape {tuple(squares.shape)}, on {squares.device}; must be a 0-dim float64 tensor on "
            f"{grad.device}, where the gradient is"
        )


def check_operands(
    weight: Tensor, runs: Runs, master: Tensor | None, grad: Tensor, dtype: torch.dtype, rounding: Rounding
) -> None:
    """Raises ValueError unless all operands but the moments suit a step computed in ``dtype``."""
    check_vector("weight", weight, runs.numel)
    check_vector("grad", grad, runs.num_entries)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding = {rounding!r}: must be 'nearest' or 'stochastic'")
    if rounding == "stochastic" and weight.dtype == torch.float16:
        raise ValueError(
            "rounding = 'stochastic': needs a bf16 weight, got fp16; use 'nearest' with a master"
        )
    if master is not None:
        check_vector("master", master, runs.num_entries, (dtype,))
    elif weight.dtype != dtype and rounding != "stochastic":
        raise ValueError(
            f"master = None: a {weight.dtype} weight would lose small updates; pass an fp32 master"
        )


def check_step(step: int | Tensor, grad_scale: float | Tensor, runs: Runs) -> None:
    """Raises ValueError unless the step counts from 1 and the scale is one number."""
    if isinstance(step, Tensor):
        check_vector("step", step, runs.num_entries, (torch.int32,))
    elif step < 1:
        raise ValueError(f"step = {step}: must be at least 1, it counts this step")
    if isinstance(grad_scale, Tensor) and grad_scale.dim() != 0:
        raise ValueError(f"grad_scale: shape {tuple(grad_scale.shape)}, must be a 0-dim tensor or a float")
