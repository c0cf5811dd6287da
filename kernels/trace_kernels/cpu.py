"""The C++ path of the ops on CPU tensors: builds cpu_kernels.cpp on first use and calls it through ctypes.

The library has a plain C interface and sees no torch header: it compiles in about a second and serves every torch
version. It is kept under a name made of the source, the command and the CPU's instruction sets, in
``TORCH_EXTENSIONS_DIR`` or ``~/.cache/torch_extensions``. Each process that does not find it builds its own and renames it
into place, so ranks may start together and a killed build leaves no lock behind.

Environment: ``CXX`` names the compiler (default g++); ``TRACE_KERNELS_CPU=torch`` keeps CPU tensors on the torch path.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .runs import Runs

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Code of each dtype the C++ path computes on."""

# No contraction: a multiply and an add fuse where the source says so alone. No errno and no traps: square roots and
# selects vectorise; results keep their bits.
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_TIMEOUT_S = 300
_ENTRIES_PER_THREAD = 1 << 14
_SWAPPED_PER_THREAD = 1 << 22
"""A swap only moves, and one thread moves long units as fast as memory goes. On a machine with other work a second one, which
everything waits for, comes late by more than this many entries take."""
_SHORT, _SLOWER = 16, 32
"""Elements of a unit that is short; its entries take so much longer, each a cache line of its own."""


class _Runs(ctypes.Structure):
    """Runs of cpu_kernels.cpp."""

    _fields_ = (
        ("units", c_void_p),
        *((name, c_int64) for name in ("unit_bytes", "num_entries", "block", "base", "skip")),
    )


class _Step(ctypes.Structure):
    """Step of cpu_kernels.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "master", "exp_avg", "exp_avg_sq", "grad", "ages")),
        *((name, c_void_p) for name in ("step_sizes", "corrections2_sqrt")),
        *((f"{name}_dtype", c_int64) for name in ("weight", "grad", "exp_avg", "exp_avg_sq")),
        *((name, c_int64) for name in ("last_age", "stochastic", "key_1", "key_2")),
        *(
            (name, c_double)
            for name in (
                "step_size",
                "correction2_sqrt",
                "grad_scale",
                "decay",
                "weight1",
                "beta2",
                "weight2",
                "eps",
            )
        ),
        ("squares", c_void_p),
    )


class _Swap(ctypes.Structure):
    """Swap of cpu_kernels.cpp."""

    _fields_ = (("runs", _Runs), ("weight", c_void_p), ("values", c_void_p), ("bytes", c_int64))


_RUNS, _STEP, _PTR, _INT = ctypes.POINTER(_Runs), ctypes.POINTER(_Step), c_void_p, c_int64
_SIGNATURES = {
    "masked_adamw": (_RUNS, _STEP, _INT),
    "compact_gather": (_RUNS, _PTR, _INT, _PTR, c_double, _INT, _PTR, _INT),
    "compact_scatter": (_RUNS, _PTR, _INT, _PTR, _INT, _INT),
    "delta_swap": (ctypes.POINTER(_Swap), _INT, _INT),
    "delta_write": (ctypes.POINTER(_Swap), _INT, _INT),
    "compact_sumsq": (_PTR, _INT, _INT, _INT),
}


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The built library; None, with one warning, where it cannot be built, and None where the user wants none."""
    choice = os.environ.get("TRACE_KERNELS_CPU", "auto")
    if choice not in ("auto", "torch"):
        raise ValueError(f"TRACE_KERNELS_CPU={choice!r}: must be 'auto' or 'torch'")
    if choice == "torch":
        return None
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"trace_kernels: no C++ path on this CPU, the slower torch path is taken ({detail.strip()[-300:]}); "
            "install g++, or set TRACE_KERNELS_CPU=torch to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, None
    library.compact_sumsq.restype = c_double
    return library


def _build() -> Path:
    """Path of the library, compiled if it is not there yet."""
    command = [os.environ.get("CXX", "g++"), *_FLAGS]
    recipe = (SOURCE.read_text(encoding="utf-8"), *command, platform.machine(), _instruction_sets())
    key = hashlib.sha256("\n".join(recipe).encode()).hexdigest()[:16]
    path = _cache() / "trace_kernels" / f"cpu_kernels_{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            subprocess.run(
                [*command, str(SOURCE), "-o", str(built)],
                check=True,
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
            )
            built.replace(path)
    return path


def _cache() -> Path:
    """Where libraries are kept.

    Raises:
        FileNotFoundError: a user without a home (no HOME, and no entry of the system's) has named no folder.
    """
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root)
    try:
        return Path.home() / ".cache" / "torch_extensions"
    except RuntimeError:
        raise FileNotFoundError("no home for the library; set HOME or TORCH_EXTENSIONS_DIR") from None


def _instruction_sets() -> str:
    """What ``-march=native`` depends on: nodes of several kinds may share one cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def adamw(
    weight: Tensor,
    runs: Runs,
    master: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    by_age: tuple[Tensor, Tensor, Tensor] | None,
    stochastic: bool,
    keys: tuple[int, int],
    scalars: tuple[float, ...],
    squares: Tensor | None,
) -> None:
    """One masked AdamW step; see masked_adamw.py.

    Args:
        by_age: ages, int32 [num_entries], and the fp32 tables of hyper.py; None where all entries share one step.
        stochastic: how the weight is rounded; to nearest otherwise.
        keys: of all stochastic rounding.
        scalars: step size and root of the second correction (unused by age), grad_scale, decay, 1 - beta1, beta2, 1 - beta2, eps.
    """
    step = _Step(
        weight.data_ptr(),
        None if master is None else master.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        *(map(Tensor.data_ptr, by_age) if by_age else (None, None, None)),
        DTYPES[weight.dtype],
        DTYPES[grad.dtype],
        DTYPES[exp_avg.dtype],
        DTYPES[exp_avg_sq.dtype],
        by_age[1].numel() - 1 if by_age else 0,
        stochastic,
        *keys,
        *scalars,
        None if squares is None else squares.data_ptr(),
    )
    _loaded().masked_adamw(_runs(runs), step, _num_threads(runs.num_entries))


def gather(
    src: Tensor, runs: Runs, out: Tensor, scale: float, accumulate: bool, sumsq: bool = False
) -> Tensor:
    """`compact_gather`; the sum of squares, fp64 0-dim, is 0 unless ``sumsq``."""
    total = torch.zeros((), dtype=torch.float64)
    _loaded().compact_gather(
        _runs(runs),
        *(src.data_ptr(), DTYPES[src.dtype], out.data_ptr(), scale, accumulate),
        total.data_ptr() if sumsq else None,
        _num_threads(runs.num_entries),
    )
    return total


def scatter(dst: Tensor, runs: Runs, values: Tensor) -> None:
    """`compact_scatter`."""
    _loaded().compact_scatter(
        _runs(runs),
        *(dst.data_ptr(), DTYPES[dst.dtype], values.data_ptr(), DTYPES[values.dtype]),
        _num_threads(runs.num_entries),
    )


class Swaps:
    """Operands of `delta_swap`, of elements of 2, 4 or 8 bytes, to be swapped or written in one call.

    Args:
        operands: weight, runs and values of each parameter.
    """

    def __init__(self, operands: Sequence[tuple[Tensor, Runs, Tensor]]) -> None:
        self._operands = operands  # keeps what the table points to
        rows = (
            _Swap(_runs(runs), weight.data_ptr(), values.data_ptr(), weight.element_size())
            for weight, runs, values in operands
        )
        self._table = (_Swap * len(operands))(*rows)
        self._work = sum(
            runs.num_entries * (_SLOWER if runs.block < _SHORT else 1) for _, runs, _ in operands
        )

    def run(self) -> None:
        """Swap."""
        _loaded().delta_swap(self._table, len(self._table), self._num_threads())

    def write(self) -> None:
        """Write the values into the weights."""
        _loaded().delta_write(self._table, len(self._table), self._num_threads())

    def _num_threads(self) -> int:
        return _num_threads(self._work, _SWAPPED_PER_THREAD)


def sumsq(values: Tensor) -> Tensor:
    """`compact_sumsq`."""
    num_entries = values.numel()
    operands = (values.data_ptr(), DTYPES[values.dtype], num_entries, _num_threads(num_entries))
    return torch.tensor(_loaded().compact_sumsq(*operands), dtype=torch.float64)


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether all operands are on the CPU, the floats of a dtype the C++ path computes on, and the library is there."""
    for tensor in tensors:
        if not tensor.is_cpu or (tensor.dtype not in DTYPES and tensor.is_floating_point()):
            return False
    return library() is not None


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise AssertionError("the C++ path was called without its library")
    return loaded


def _runs(runs: Runs) -> _Runs:
    units = runs.units
    return _Runs(units.data_ptr(), units.element_size(), runs.num_entries, runs.block, runs.base, runs.skip)


def _num_threads(num_entries: int, per_thread: int = _ENTRIES_PER_THREAD) -> int:
    """Threads worth their start, at most those torch uses."""
    return max(1, min(torch.get_num_threads(), num_entries // per_thread))
