"""Watching a process's memory over time: resident bytes on a CPU, allocated bytes of torch's allocator on a GPU.

[Note: resident memory] On a CPU the peak is the kernel's own high-water mark (``VmHWM``), reset through
``/proc/self/clear_refs``. glibc keeps freed blocks and hands them out again, so what a process holds depends on its history;
``settle_allocator`` makes it give back every freed block of 64 KiB and more at once, as torch's CUDA statistics count freed
blocks as free.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_RETURNED_FROM = 1 << 16
_KEPT_BELOW = 32 << 20
"""Blocks that glibc keeps in a process that has run for a while; its largest value."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def settle_allocator() -> None:
    """Have glibc return freed blocks to the system at once; does nothing on other C libraries."""
    _return_from(_RETURNED_FROM, _RETURNED_FROM)


def keep_freed_blocks() -> None:
    """Have glibc keep freed blocks as it does by itself after a while, which is faster."""
    _return_from(_KEPT_BELOW, 2 * _KEPT_BELOW)


def _return_from(mapped: int, trimmed: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in (
            (_M_MMAP_THRESHOLD, mapped),
            (_M_TRIM_THRESHOLD, trimmed),
            (_M_MMAP_MAX, 1 << 20),
        ):
            mallopt(option, value)


def bytes_now(device: torch.device) -> int:
    """Resident bytes of this process, or allocated bytes of a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@dataclass
class Timeline:
    """Memory over time.

    Attributes:
        seconds: of each sample, from the start.
        bytes: of each sample.
        phases: (name, begin, end) in seconds.
        peak: the most bytes at any time, also between samples.
    """

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    peak: int = 0


class Watch:
    """Samples memory in a thread of its own while it is entered.

    Args:
        device: whose memory.
        baseline: bytes that are subtracted from every sample.
        interval_ms: time between two samples.
    """

    def __init__(self, device: torch.device, baseline: int, interval_ms: float = 2.0) -> None:
        self.timeline = Timeline()
        self._device, self._baseline, self._interval = device, baseline, interval_ms / 1e3
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._begin = 0.0

    def __enter__(self) -> Watch:
        gc.collect()
        _reset_peak(self._device)
        self._begin = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        sampled = max(self.timeline.bytes, default=0)
        self.timeline.peak = max(sampled, _peak(self._device) - self._baseline)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens now."""
        begin = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.timeline.phases.append((name, begin - self._begin, time.perf_counter() - self._begin))

    def _sample(self) -> None:
        while not self._ended.wait(self._interval):
            self.timeline.seconds.append(time.perf_counter() - self._begin)
            self.timeline.bytes.append(bytes_now(self._device) - self._baseline)


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for backward while it is entered, but for the module's own parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._module = module
        self._storages: dict[int, int] = {}

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        own = (t for t in (*self._module.parameters(), *self._module.buffers()) if not isinstance(t, DTensor))
        if storage.data_ptr() not in (t.untyped_storage().data_ptr() for t in own):
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the storages kept; several views of one count once."""
        return sum(self._storages.values())


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
