"""What AdamW keeps for the masked entries of one parameter, and in how many bytes.

| option | bytes per entry and moment | |
|---|---|---|
| ``state_dtype="float32"`` | 4 | |
| ``state_dtype="bfloat16"`` | 2 | computed in fp32; the second moment is rounded stochastically, or it would stand still |
| ``state_dtype="8bit"`` | 1 + 4/256 | blockwise dynamic codes (Dettmers et al. 2022, arXiv 2110.02861), bitsandbytes' format |
| ``master=True`` | 4 (no moment) | fp32 copy of half-precision weights; fp32 weights are their own |
| ``master=False`` | 0 | bf16 weights are their own, rounded stochastically so that small updates survive on average |

The state of one parameter is a flat ``dict``: ``step`` (int), ``exp_avg``, ``exp_avg_sq``, and, where they exist, ``master`` and
the block scales ``exp_avg_absmax``, ``exp_avg_sq_absmax``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather, compact_scatter, compact_sumsq
from trace_kernels.masked_adamw import Rounding, masked_adamw
from trace_kernels.masked_adamw_8bit import (
    Blockwise,
    dequantize_blockwise,
    masked_adamw_8bit,
    quantize_blockwise,
)
from trace_kernels.rounding import stochastic_bf16
from trace_kernels.runs import Runs

from trace_dist.config import StateDtype

MOMENTS = ("exp_avg", "exp_avg_sq")
SIGNED = "exp_avg"
"""The moment whose codes are of the signed map."""
State = dict[str, Any]


@dataclass(frozen=True)
class StateOptions:
    """How the states are kept.

    Raises:
        ValueError: an option is unknown.
    """

    state_dtype: StateDtype = "float32"
    master: bool = True
    offload: Literal["none", "cpu"] = "none"

    def __post_init__(self) -> None:
        for name, allowed in (("state_dtype", get_args(StateDtype)), ("offload", ("none", "cpu"))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: unknown; use one of {', '.join(allowed)}")

    def check_weight(self, name: str, dtype: torch.dtype) -> None:
        """Raise ValueError where a weight's dtype cannot be trained with these options."""
        if dtype == torch.float16 and not self.master:
            raise ValueError(
                f"master=False: {name} is fp16, which has no stochastic rounding here; use master=True or bfloat16 weights"
            )
        if dtype == torch.float64 and self.state_dtype == "8bit":
            raise ValueError(
                f"state_dtype='8bit': {name} is fp64; use state_dtype='float32' for fp64 weights"
            )


def new_state(values: Tensor, options: StateOptions) -> State:
    """The state of entries that have not been trained yet.

    Args:
        values: [n] present values in the dtype of the weight, on the device where the states live.
        options: what to keep.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    state: State = {"step": 0}
    if options.master and values.dtype != wide:
        state["master"] = values.to(wide)
    for moment in MOMENTS:
        if options.state_dtype == "8bit":
            state[moment], state[f"{moment}_absmax"] = Blockwise.zeros(len(values), values.device)
        else:
            dtype = wide if wide == torch.float64 else getattr(torch, options.state_dtype)
            state[moment] = torch.zeros(len(values), dtype=dtype, device=values.device)
    return state


def tensors_of(state: State) -> dict[str, Tensor]:
    """The tensors of a state by name: what is saved and counted."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def moment_values(state: State, moment: str) -> Tensor:
    """A moment in full precision: [n]."""
    if not is_quantized(state):
        return state[moment]
    return dequantize_blockwise(_blockwise(state, moment), signed=moment == SIGNED)


def set_moment(state: State, moment: str, values: Tensor) -> None:
    """Overwrite a moment with values of any precision, [n]."""
    if not is_quantized(state):
        state[moment].copy_(values)
        return
    values = values.to(state[moment].device, torch.float32)
    quantize_blockwise(values, signed=moment == SIGNED, out=_blockwise(state, moment))


def is_quantized(state: State) -> bool:
    """Whether the moments are 8-bit codes with block scales."""
    return "exp_avg_absmax" in state


def update(
    name: str,
    weight: Tensor,
    runs: Runs,
    grad: Tensor,
    state: State,
    group: dict[str, Any],
    grad_scale: float | Tensor,
    squares: Tensor | None = None,
) -> None:
    """One AdamW step on the entries ``runs`` of ``weight``, in place.

    Args:
        name: parameter; seeds the stochastic rounding together with the step.
        weight: [runs.numel] local slice.
        runs: the entries.
        grad: [runs.num_entries] their gradient.
        state: from ``new_state``; the step count is raised.
        group: lr, betas, eps, weight_decay.
        grad_scale: factor on the gradient.
        squares: 0-dim float64, to which the gradient's sum of squares is added.
    """
    state["step"] += 1
    options: dict[str, Any] = {
        "lr": float(group["lr"]),
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "step": state["step"],
        "grad_scale": grad_scale,
        "rounding": rounding_of(state, weight),
        "seed": seed_of(name, state["step"]),
    }
    master = state.get("master")
    if is_quantized(state):
        if squares is not None:
            squares.add_(compact_sumsq(grad))
        exp_avg, exp_avg_sq = (_blockwise(state, moment) for moment in MOMENTS)
        masked_adamw_8bit(weight, runs, master, grad, exp_avg, exp_avg_sq, **options)
    else:
        moments = (state["exp_avg"], state["exp_avg_sq"])
        masked_adamw(weight, runs, master, grad, *moments, **options, squares=squares)


def scaled_update(
    name: str,
    weight: Tensor,
    runs: Runs,
    grad: Tensor,
    state: State,
    group: dict[str, Any],
    grad_scale: float | Tensor,
    squares: Tensor | None,
    factors: Tensor,
) -> None:
    """``update`` where every entry has a learning rate of its own, ``factors`` times the group's; the moments are the same.

    AdamW's moments do not depend on the values, so the step is taken on a full-precision copy and that share of it kept. An entry
    of factor 1 gets the bits of ``update``; one of factor 0 stays as it is. Transient memory: two such copies of one parameter.

    Args:
        name, weight, runs, grad, state, group, grad_scale, squares: as of ``update``.
        factors: [runs.num_entries] fp32, where the state lives.
    """
    rounds_by_chance = rounding_of(state, weight) == "stochastic"
    second = MOMENTS[1]
    narrow = state[second].dtype == torch.bfloat16
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    before = state["master"] if "master" in state else compact_gather(weight, runs).to(wide)
    after, count = before.clone(), len(before)
    whole = Runs.whole(
        torch.zeros(min(count, 1), dtype=torch.int32, device=weight.device), max(count, 1), count
    )
    moments = {key: value for key, value in state.items() if key != "master"}
    if narrow:
        moments[second] = state[second].float()
    update(name, after, whole, grad, moments, group, grad_scale, squares)
    state["step"] = moments["step"]
    # from the nearer end: exact for the factors 0 and 1
    values = torch.lerp(before, after, factors.to(wide))
    if "master" in state:
        state["master"].copy_(values)
    if rounds_by_chance or narrow:
        seed = seed_of(name, state["step"])
        for piece in runs.pieces():
            span, places = slice(piece.start, piece.stop), piece.indices(weight.device) + runs.base
            if rounds_by_chance:
                values[span] = stochastic_bf16(values[span], places, seed)
            if narrow:
                state[second][span] = stochastic_bf16(moments[second][span], places, seed, upper=True)
    compact_scatter(weight, runs, values)


def rounding_of(state: State, weight: Tensor) -> Rounding:
    """How new values become the weight."""
    return "nearest" if "master" in state or weight.dtype != torch.bfloat16 else "stochastic"


def seed_of(name: str, step: int) -> int:
    """Of the stochastic rounding of a parameter at a step; that of step 0 plus the step."""
    return (zlib.crc32(name.encode()) << 32) + step


def _blockwise(state: State, moment: str) -> Blockwise:
    return Blockwise(state[moment], state[f"{moment}_absmax"])
