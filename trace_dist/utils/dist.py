"""Ranks of this job. Works unlaunched (one process) and under deepspeed, torchrun, accelerate, mpirun or srun.

On a machine with GPUs CPU tensors travel over gloo and GPU tensors over NCCL. A rank waits for the others for an hour at most,
or for DEEPSPEED_TIMEOUT minutes where that variable is set.
"""

from __future__ import annotations

import atexit
import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trace_dist.utils.launch import adopt_launch

DRAIN_SECONDS = 0.1
_beside: tuple[Any, Any] | None = None
"""A default group, and the ``exchange_group`` beside it."""


def rank() -> int:
    """Rank of this process; 0 when no process group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes; 1 when no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and logs."""
    return rank() == 0


def local_device() -> torch.device:
    """The CUDA device of this rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def init_distributed() -> None:
    """Join the job that a launcher described in the environment; does nothing in a plain process.

    Raises:
        ValueError: the launcher's variables are incomplete or contradict each other, or the ranks cannot meet.
    """
    if dist.is_initialized():
        return
    num_ranks = adopt_launch()
    # A launcher always names a meeting point; `ensure_group` does not, and its variables outlive its group.
    if num_ranks == 1 and not ("RANK" in os.environ and "MASTER_ADDR" in os.environ):
        return
    device, timeout = local_device(), _timeout()
    options: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    try:
        dist.init_process_group(_backend(), timeout=timeout, **options)
    except (RuntimeError, ValueError) as error:
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise ValueError(
            f"{place}: rank {os.environ['RANK']} of {num_ranks} cannot meet the others ({error}); "
            "name a machine that all ranks reach and a port that is free there"
        ) from error


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _timeout() -> timedelta:
    """How long a collective waits for a rank."""
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", "60")
    if not minutes.isdecimal() or int(minutes) < 1:
        raise ValueError(f"DEEPSPEED_TIMEOUT={minutes!r}: must be a number of minutes; use for example 60")
    return timedelta(minutes=int(minutes))


def exchange_group() -> dist.ProcessGroup:
    """All ranks, over connections of their own, beside the default group: CPU tensors over gloo, others as there.

    What it carries may come in another order, seen from rank to rank, than what the default group carries. The first call is
    collective.
    """
    global _beside
    default = dist.group.WORLD
    if _beside is None or _beside[0] is not default:
        backend = dist.get_backend_config()
        backend = backend if "cpu:" in backend else f"cpu:gloo,{backend}"
        _beside = default, dist.new_group(backend=backend, timeout=_timeout())
    return _beside[1]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place; the tensor itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def max_over_ranks(value: float) -> float:
    """Largest value over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64, device=local_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def all_gather_uneven(mine: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Concatenation over ranks of 1-D tensors, on every rank.

    Args:
        mine: [sizes[rank]] this rank's part.
        sizes: length of every rank's part.
    """
    if len(sizes) == 1:
        return mine
    padded = mine.new_zeros(max(sizes))
    padded[: len(mine)] = mine
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def ensure_group() -> None:
    """Make sure a process group exists, of one process where nothing was launched (DeepSpeed needs one)."""
    init_distributed()
    if not dist.is_initialized():
        for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            os.environ.setdefault(key, value)
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def close() -> None:
    """Leave the process group, if there is one."""
    global _beside
    _beside = None
    if dist.is_initialized():
        _drain()
        dist.destroy_process_group()


@atexit.register
def _drain() -> None:
    """Let gloo's threads drop the tensors of their last collectives.

    They take the GIL for that, and a thread that asks for it while the interpreter shuts down aborts the process
    ("terminate called without an active exception"). Sleeping gives it away.
    """
    if world_size() > 1 and "gloo" in dist.get_backend():
        time.sleep(DRAIN_SECONDS)
