"""Which path runs an op, and how a support is cut into Triton programs. The one place that decides either.

A CUDA or HIP tensor takes the Triton kernel. A CPU tensor takes the C++ path where the op has one, the operands
are fp32 and bf16 and a compiler was found (cpu.py), else the vectorised torch path. float64 always takes the
torch path: Triton passes Python floats as fp32. ``impl="triton"`` on a CPU tensor runs the kernel under
Triton's interpreter and needs ``TRITON_INTERPRET=1`` before the first import.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cpu
from .runs import Runs

Impl = Literal["auto", "triton", "cpp", "torch"]
Path = Literal["triton", "cpp", "torch"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TILE = 1024
"""Entries per Triton program."""
NUM_THREADS = 128
"""Threads per Triton program: each handles 8 entries, one 16-byte vector of bf16."""
ALIGN = 8
"""Elements every edge of a tile must be a multiple of for loads to be 16-byte vectors, in bf16 too."""


class BenchCase(NamedTuple):
    """One op ready to be timed: ``run`` does the work, ``num_bytes`` is the least memory traffic it needs."""

    run: Callable[[], object]
    num_bytes: int


@triton.jit
def locate_program(  # type: ignore[no-untyped-def]
    pid,
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Local index, compact position, validity of the entries of program ``pid`` (int64; runs.py, [Note: compact order]).

    LANES == 0 gives a [UNITS] tile of compact positions, else a [UNITS, LANES] tile of LANES-wide strips.
    """
    if LANES == 0:
        position = pid * UNITS + tl.arange(0, UNITS)
        valid = position < num_entries
        q = position + skip
        unit = tl.load(units_ptr + q // block, mask=valid, other=0).to(tl.int64)
        local = unit * block + q % block - base
    else:
        num_strips = tl.cdiv(block, LANES)
        index = (pid // num_strips) * UNITS + tl.arange(0, UNITS)
        lane = ((pid % num_strips) * LANES + tl.arange(0, LANES))[None, :]
        in_range = index < num_units
        unit = tl.load(units_ptr + index, mask=in_range, other=0).to(tl.int64)
        unit_local = unit * block - base
        unit_position = index * block - skip
        low = tl.maximum(0, -unit_position)
        high = tl.minimum(block, num_entries - unit_position)
        if ALIGNED:
            unit_local = tl.multiple_of(unit_local, 8)
            unit_position = tl.multiple_of(unit_position, 8)
            low = tl.multiple_of(low, 8)
            high = tl.multiple_of(high, 8)
        local = unit_local[:, None] + lane
        position = unit_position[:, None] + lane
        valid = in_range[:, None] & (lane >= low[:, None]) & (lane < high[:, None])
    return local, position, valid


@triton.jit
def locate(  # type: ignore[no-untyped-def]
    units_ptr,
    num_units,
    num_entries,
    block,
    base,
    skip,
    UNITS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """`locate_program` of this program."""
    pid = tl.program_id(0).to(tl.int64)
    return locate_program(pid, units_ptr, num_units, num_entries, block, base, skip, UNITS, LANES, ALIGNED)


def strip_width(block: int) -> int:
    """Lanes of a tile over units of ``block``: the widest power of two that pads them by less than an eighth."""
    if block <= 64:
        return triton.next_power_of_2(block)
    lanes = TILE
    while lanes > 64 and 8 * triton.cdiv(block, lanes) * lanes >= 9 * block:
        lanes //= 2
    return lanes


class Plan(NamedTuple):
    """Grid and constexprs that make `locate` cover a support exactly once."""

    num_programs: int
    constexprs: dict[str, int | bool]


def plan(runs: Runs) -> Plan:
    """Chooses the tile: 2-D for units of 16 and more elements, 1-D over compact positions below that."""
    if runs.block < 16:
        return Plan(triton.cdiv(runs.num_entries, TILE), {"UNITS": TILE, "LANES": 0, "ALIGNED": False})
    lanes = strip_width(runs.block)
    units = TILE // lanes
    aligned = not any(edge % ALIGN for edge in (runs.block, runs.base, runs.skip, runs.tail))
    num_programs = triton.cdiv(runs.num_units, units) * triton.cdiv(runs.block, lanes)
    return Plan(num_programs, {"UNITS": units, "LANES": lanes, "ALIGNED": aligned})


def run_args(runs: Runs) -> tuple[Tensor, int, int, int, int, int]:
    """The arguments of `locate` that describe a support, in its order."""
    return runs.units, runs.num_units, runs.num_entries, runs.block, runs.base, runs.skip


def launch(kernel: Any, num_programs: int, device: torch.device, /, *args: object, **options: object) -> None:
    """Launches on the tensors' own device, which need not be the current one.

    ``enable_fp_fusion=False`` keeps a multiply and an add apart, so that every path rounds alike.
    """
    num_warps = NUM_THREADS // (64 if torch.version.hip else 32)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[(num_programs,)](*args, **options, num_warps=num_warps, enable_fp_fusion=False)


def choose(impl: Impl, *tensors: Tensor) -> Path:
    """The path that runs an op with all three, given the caller's wish and the operands.

    Raises:
        ValueError: see `use_triton`; or C++ asked for where it cannot run.
    """
    if impl in ("auto", "cpp") and cpu.serves(tensors):
        return "cpp"
    if use_triton("auto" if impl == "cpp" else impl, *tensors):
        if impl == "cpp":
            raise ValueError("impl = 'cpp' on a GPU tensor: runs on CPU tensors alone; use impl='auto'")
        return "triton"
    if impl == "cpp":
        raise ValueError(
            "impl = 'cpp': needs fp32 and bf16 operands on the CPU, and a C++ compiler; use impl='auto'"
        )
    return "torch"


def use_triton(impl: Impl, *tensors: Tensor) -> bool:
    """Whether the Triton kernel runs, given the caller's wish and the operands, for an op without a C++ path.

    Raises:
        ValueError: operands on several devices, an unknown ``impl``, or Triton asked for where it cannot run.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"operands are on {sorted(map(str, devices))}: must share one device; move them with .to()"
        )
    on_gpu = tensors[0].is_cuda
    has_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if impl == "auto":
        return on_gpu and not has_double
    if impl == "torch":
        return False
    if impl != "triton":
        raise ValueError(f"impl = {impl!r}: must be 'auto', 'triton', 'torch' or, where an op has it, 'cpp'")
    if has_double:
        raise ValueError("impl = 'triton': float64 has no Triton path; use impl='auto'")
    if not on_gpu and isinstance(locate, triton.JITFunction):
        raise ValueError("impl = 'triton' on a CPU tensor: set TRITON_INTERPRET=1 before the first import")
    return True


def check_vector(name: str, tensor: Tensor, numel: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises ValueError unless ``tensor`` is a contiguous [numel] vector of one of ``dtypes``."""
    if tensor.shape != (numel,):
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)}, must be ({numel},); pass the flattened local tensor"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: stride {tensor.stride()}, must be contiguous; call .contiguous() first")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, must be one of {', '.join(map(str, dtypes))}")
