"""`masked_adamw` of many parameters in one launch.

On a GPU a launch costs the host ten times what a small parameter's step costs the device: a model of 200 masked matrices would
be bound by 200 launches. Here parameters of one kind (dtypes, block, tile, step) share one, through tables ([Note: table] in
table.py). Operands must stay where they are, which `AdamWBatch.holds` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, locate_program
from .hyper import AdamWHyper
from .masked_adamw import Operands, Rounding, check_state, update_tile
from .rounding import seed_keys_kernel
from .table import TYPES, pointer, tables, tile_of

_POINTERS = ("weight", "master", "grad", "exp_avg", "exp_avg_sq")
_FIELDS = len(_POINTERS) + 7
"""Columns of the table: the operands, unit ids, their number, entries, base, skip, first program, seed."""


@triton.jit(do_not_specialize=["step"])
def _adamw_batch_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    owner_ptr,
    step_size,
    correction2_sqrt,
    grad_scale,  # number, or pointer to a scalar
    decay,
    weight1,
    beta2,
    weight2,
    eps,
    step,
    block,
    FIELDS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    SCALE_IS_POINTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(owner_ptr + pid).to(tl.int64) * FIELDS
    units_ptr = pointer(row, 5, UNIT, False)
    num_units, num_entries = tl.load(row + 6), tl.load(row + 7)
    base, skip = tl.load(row + 8), tl.load(row + 9)
    if ALIGNED:
        base, skip = tl.multiple_of(base, 8), tl.multiple_of(skip, 8)
    first = tl.load(row + 10)
    local, position, valid = locate_program(
        pid - first, units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED
    )
    if SCALE_IS_POINTER:
        grad_scale = tl.load(grad_scale).to(tl.float32)
    key_1, key_2 = seed_keys_kernel(tl.load(row + 11) + step)
    weight_ptr, grad_ptr = pointer(row, 0, WEIGHT, ALIGNED), pointer(row, 2, GRAD, ALIGNED)
    exp_avg_ptr, exp_avg_sq_ptr = pointer(row, 3, EXP_AVG, ALIGNED), pointer(row, 4, EXP_AVG_SQ, ALIGNED)
    master_ptr = pointer(row, 1, tl.float32, ALIGNED) if HAS_MASTER else None
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


class AdamWBatch:
    """Parameters on one device whose steps are taken together, by the Triton kernel.

    Args:
        operands: of each parameter, as `masked_adamw` takes them; fp32 moments or bf16 ones, no fp64.
        seeds: of each parameter's stochastic rounding; its step is added.
        rounding: as of `masked_adamw`.

    Raises:
        ValueError: shapes or dtypes break a rule of `masked_adamw`.
    """

    def __init__(
        self, operands: Sequence[Operands], seeds: Sequence[int], rounding: Rounding = "nearest"
    ) -> None:
        self._places = _places(operands)
        kinds: dict[tuple[Any, ...], list[tuple[Operands, int]]] = {}
        for state, seed in zip(operands, seeds, strict=True):
            check_state(state, rounding)
            if state.dtype == torch.float64:
                raise ValueError(f"weight: {state.weight.dtype} has no Triton path; use masked_adamw")
            if state.runs.num_entries:
                kinds.setdefault(_kind(state, rounding), []).append((state, seed))
        self._launches = [_Launch(kind, members) for kind, members in kinds.items()]
        self.num_launches = len(self._launches)
        """Launches of one step."""

    def holds(self, operands: Sequence[Operands]) -> bool:
        """Whether these are the batch's own operands, and lie where they lay."""
        return _places(operands) == self._places

    def step(self, hyper: AdamWHyper, step: int, grad_scale: float | Tensor = 1.0) -> None:
        """Takes one step of every parameter in place.

        Args:
            hyper: of all.
            step: 1-based, of all.
            grad_scale: factor on the gradients: a float, or a 0-dim tensor on the same device (no synchronisation).
        """
        if isinstance(grad_scale, Tensor):
            grad_scale = grad_scale.to(torch.float32)
        for each in self._launches:
            each.run(hyper, step, grad_scale)


class _Launch:
    """The parameters of one kind."""

    def __init__(self, kind: tuple[Any, ...], members: Sequence[tuple[Operands, int]]) -> None:
        *dtypes, self._has_master, self._block, tile, self._stochastic = kind
        self._types = dict(
            zip(
                ("WEIGHT", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "UNIT"),
                map(TYPES.__getitem__, dtypes),
                strict=True,
            )
        )
        self._tile = dict(tile)
        self._device = members[0][0].weight.device
        self._tables = tables(
            [_addresses(state) for state, _ in members],
            [state.runs for state, _ in members],
            [[(seed + 2**63) % 2**64 - 2**63] for _, seed in members],
            self._device,
        )
        self._members = [state for state, _ in members]  # keeps what the table points to

    def run(self, hyper: AdamWHyper, step: int, grad_scale: float | Tensor) -> None:
        """One launch."""
        scalars = (hyper.decay, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps)
        launch(
            _adamw_batch_kernel,
            len(self._tables.owners),
            self._device,
            *(*self._tables, hyper.step_size(step), hyper.correction2_sqrt(step)),
            *(grad_scale, *map(float, scalars), step, self._block),
            FIELDS=_FIELDS,
            HAS_MASTER=self._has_master,
            SCALE_IS_POINTER=isinstance(grad_scale, Tensor),
            STOCHASTIC=self._stochastic,
            **self._types,
            **self._tile,
        )


def _kind(state: Operands, rounding: Rounding) -> tuple[Any, ...]:
    """What parameters must share to share a launch."""
    tensors = (state.weight, state.grad, state.exp_avg, state.exp_avg_sq, state.runs.units)
    tile = tile_of(state.runs, [*tensors[:-1], *([] if state.master is None else [state.master])])
    stochastic = rounding == "stochastic" and state.weight.dtype == torch.bfloat16
    dtypes = (tensor.dtype for tensor in tensors)
    return (*dtypes, state.master is not None, state.runs.block, tile, stochastic)


def _places(operands: Sequence[Operands]) -> list[list[int]]:
    """Addresses of all operands."""
    return [_addresses(state) for state in operands]


def _addresses(state: Operands) -> list[int]:
    """Of the operands and the unit ids, in the order of the table's columns; 0 where there is none."""
    tensors = (*(getattr(state, name) for name in _POINTERS), state.runs.units)
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
