"""Ranks of this job. Works unlaunched (one process) and under deepspeed, torchrun, accelerate, mpirun or srun.

On a machine with GPUs CPU tensors travel over gloo and GPU tensors over NCCL. A rank that is lost is named (``utils.heartbeat``);
one that is at work alone is waited for, ``Waiting.timeout_minutes`` at most, or DEEPSPEED_TIMEOUT where that variable is set.

[Note: two timeouts] Ranks wait for one that is at work alone as hosts, over gloo. What accelerators do together is the work of
all ranks at once: a collective of theirs that takes ``DEVICE_MINUTES`` has gone wrong, and ends the job.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trace_dist.utils import network, stopping
from trace_dist.utils.heartbeat import Heartbeat, Patience, Verdict
from trace_dist.utils.launch import adopt_launch
from trace_dist.utils.open_files import allow_connections
from trace_dist.utils.wire import Place, connect, listen

DRAIN_SECONDS = 0.1
_FIRST = "trace_dist/device"
"""Where rank 0 says what it computes on."""
DEVICE_MINUTES = 10
"""How long a collective of accelerators waits ([Note: two timeouts]), unless DEEPSPEED_TIMEOUT is set."""
_beside: tuple[Any, dict[str, Any]] | None = None
"""A default group, and the groups beside it by their purpose."""
VERDICT_SECONDS = 3.0
"""How long a rank whose collective has failed waits to hear of a rank that was lost."""
_BEATING: Heartbeat | None = None
_told: dict[str, str] = {}
"""Variables that ``ensure_group`` has set."""
_minutes: int | None = None
"""``Waiting.timeout_minutes`` of this job's groups."""


class WrongDevice(ValueError):
    """A rank computes on something else than rank 0."""


@dataclass(frozen=True)
class Waiting:
    """How long ranks wait for each other.

    Attributes:
        patience: with a rank that gives no sign of life, and with a job in which nothing moves.
        timeout_minutes: of a collective of hosts, for a rank that lives and is at work alone.
    """

    patience: Patience = field(default_factory=Patience)
    timeout_minutes: int = 30


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


def take_device() -> torch.device:
    """``local_device``; CUDA makes it the calling thread's own, which is the first one otherwise, whatever other threads have."""
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def init_distributed(waiting: Waiting | None = None) -> None:
    """Join the job that a launcher described in the environment; does nothing in a plain process.

    Args:
        waiting: how long ranks wait for each other; the defaults when None.

    Raises:
        ValueError: the launcher's variables are incomplete or contradict each other, or the ranks cannot meet or may open
            too few files.
    """
    if dist.is_initialized():
        return
    num_ranks = adopt_launch()
    # A launcher always names a meeting point; `ensure_group` does not, and its variables may outlive its group.
    if num_ranks == 1 and not ("RANK" in os.environ and "MASTER_ADDR" in os.environ):
        return
    waiting = waiting or Waiting()
    global _minutes
    _minutes = waiting.timeout_minutes
    allow_connections(num_ranks)
    device, timeout = take_device(), _timeout(_minutes)
    network.choose_interface()
    options: dict[str, Any] = {}
    if device.type == "cuda":
        options["device_id"] = device
    try:
        store = _meet(device, timeout)
        options |= {"store": store, "rank": int(os.environ["RANK"]), "world_size": num_ranks}
        dist.init_process_group(_backend(), timeout=timeout, **options)
    except WrongDevice:
        raise
    except (RuntimeError, ValueError) as error:
        raise _cannot_meet(error, num_ranks) from error
    _hurry_devices(dist.group.WORLD)
    if world_size() > 1:
        _begin_heartbeat(waiting.patience)


def _meet(device: torch.device, timeout: timedelta) -> dist.Store:
    """Where the ranks meet, once this one is known to compute on what rank 0 does: NCCL would wait for one without a GPU."""
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    mine, here = f"{device.type} on {socket.gethostname()}", os.environ["RANK"]
    if here == "0":
        store.set(_FIRST, mine)
    elif (first := store.get(_FIRST).decode()).partition(" ")[0] != device.type:
        raise WrongDevice(
            f"RANK={here}: computes on {mine}, and rank 0 on {first}; see to the driver where there is no GPU "
            "(nvidia-smi, rocm-smi) and to CUDA_VISIBLE_DEVICES, or set CUDA_VISIBLE_DEVICES to nothing on every host"
        )
    return dist.PrefixStore("default_pg", store)


def _cannot_meet(error: Exception, num_ranks: int) -> ValueError:
    """What is said where a rank cannot join the others: NCCL begins there too, and has reasons of its own."""
    text, who = " ".join(str(error).split()), f"rank {os.environ['RANK']} of {num_ranks}"
    last = text.rpartition("Last error: ")[2]
    if "Duplicate GPU" in text:
        return ValueError(
            f"LOCAL_RANK={os.environ.get('LOCAL_RANK')}: {who} has the GPU of another rank ({last}); start no more ranks on a "
            "host than it has GPUs, and one alone on the MIG parts of a GPU"
        )
    if "nccl" in text.lower():
        return ValueError(
            f"NCCL: {who} cannot join the others ({last}); NCCL_DEBUG=INFO says more; set NCCL_SOCKET_IFNAME where several "
            "interfaces join the hosts, and have one driver and one version of NCCL on all of them"
        )
    place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
    return ValueError(
        f"{place}: {who} cannot meet the others ({text}); name a machine that all ranks reach and a port that is free there"
    )


def _begin_heartbeat(patience: Patience) -> None:
    """Connect all ranks to rank 0. Collective."""
    global _BEATING
    hosts, listener, hub = gather_objects(socket.gethostname()), None, None
    if rank() == 0:
        apart = len(set(hosts)) > 1
        listener = listen(apart)
        addresses = [os.environ.get("MASTER_ADDR", ""), *network.addresses()] if apart else ["127.0.0.1"]
        place = Place(addresses, listener.getsockname()[1], secrets.token_hex(16))
    place = broadcast_object(place if listener is not None else None)
    if listener is None:
        hub = connect(place)
    _BEATING = Heartbeat(rank(), hosts, patience, place.token, listener=listener, hub=hub)
    stopping.tell(_BEATING.request_stop)


def lost() -> Verdict | None:
    """Why an error has come up, where the reason is a rank that was lost; None where it is not."""
    return None if _BEATING is None else _BEATING.await_verdict(VERDICT_SECONDS)


def claim_verdict() -> bool:
    """Whether nobody has printed why this rank ends."""
    return _BEATING is not None and _BEATING.claim()


def overview() -> str:
    """What every rank is in, as far as it is known; empty in a single process."""
    return "" if _BEATING is None else _BEATING.overview()


def leave(ok: bool) -> None:
    """Say that this rank ends, so that nobody counts it as lost."""
    if _BEATING is not None:
        _BEATING.leave(ok)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _timeout(default: int) -> timedelta:
    """How long a collective waits for a rank."""
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", str(default))
    if not minutes.isdecimal() or len(minutes) > 6 or int(minutes) < 1:
        raise ValueError(
            f"DEEPSPEED_TIMEOUT={minutes!r:.40}: must be a number of minutes; use for example 60"
        )
    return timedelta(minutes=int(minutes))


def _hurry_devices(group: Any) -> None:
    """Give the collectives of a group's accelerators their own timeout ([Note: two timeouts])."""
    if "DEEPSPEED_TIMEOUT" in os.environ:
        return
    minutes = min(DEVICE_MINUTES, _minutes or Waiting.timeout_minutes)
    for backend in map(group._get_backend, group._device_types):
        if backend.name() == "nccl":
            backend._set_default_timeout(timedelta(minutes=minutes))


def exchange_group() -> dist.ProcessGroup:
    """All ranks, over connections of their own, beside the default group: CPU tensors over gloo, others as there.

    What it carries may come in another order, seen from rank to rank, than what the default group carries. The first call is
    collective.
    """
    return _group_beside("exchange")


def indices_group() -> dist.ProcessGroup:
    """As ``exchange_group``, for gathers of indices, whose order is another one again."""
    return _group_beside("indices")


def rows_group(size: int) -> dist.ProcessGroup:
    """This rank's group of ``size`` ranks, one after another, as ``exchange_group``. They must divide the number of ranks."""
    return _group_beside(f"rows of {size}", size)


def lane_of(group: Any) -> str:
    """What a group is for: ``exchange``, ``indices``, ``rows of 2``, or, of any other, ``gather``."""
    groups = {} if _beside is None else _beside[1]
    return next((purpose for purpose, beside in groups.items() if beside is group), "gather")


def _group_beside(purpose: str, size: int | None = None) -> dist.ProcessGroup:
    """The group of a purpose, of all ranks or of ``size`` of them."""
    global _beside
    default = dist.group.WORLD
    if _beside is None or _beside[0] is not default:
        _beside = (default, {})
    groups = _beside[1]
    if purpose not in groups:
        backend = dist.get_backend_config()
        backend = backend if "cpu:" in backend else f"cpu:gloo,{backend}"
        options: dict[str, Any] = {
            "backend": backend,
            "timeout": _timeout(_minutes or Waiting.timeout_minutes),
        }
        made = dist.new_group(**options) if size is None else dist.new_subgroups(size, **options)[0]
        groups[purpose] = made
        _hurry_devices(made)
    return groups[purpose]


def _meeting_device() -> torch.device:
    """Where the hosts agree on values of their own: over gloo, where the default group has it."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config() else local_device()


def barrier() -> None:
    """Wait for every rank: for its host alone, where hosts have a backend beside that of their accelerators."""
    if world_size() == 1:
        return
    if local_device().type != _meeting_device().type:
        dist.all_reduce(torch.zeros(()))
    else:
        dist.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks, in place; the tensor itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def largest_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Largest value of a tensor over all ranks, in place; the tensor itself in a single process."""
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def max_over_ranks(value: float) -> float:
    """Largest value over all ranks; accelerators are not waited for."""
    if world_size() == 1:
        return value
    return float(largest_over_ranks(torch.tensor([value], dtype=torch.float64, device=_meeting_device())))


def from_main(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's values of a contiguous tensor, in place, on every rank."""
    if world_size() > 1:
        dist.broadcast(value, src=0)
    return value


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
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        _told.update({key: value for key, value in own.items() if key not in os.environ})
        os.environ.update(_told)
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)


def close(ok: bool = True) -> None:
    """Leave the process group, if there is one; ``ok`` is whether this rank's work is done."""
    global _BEATING, _beside
    _beside = None
    leave(ok)
    stopping.tell(None)
    _BEATING = None
    if dist.is_initialized():
        _drain()
        dist.destroy_process_group()
    # Left behind they would say to whoever comes next, such as TrainingArguments, that a launcher has started this process.
    while _told:
        os.environ.pop(_told.popitem()[0], None)


@atexit.register
def _say_goodbye() -> None:
    """Ranks of scripts that end by themselves; one that was ended by an error has printed it."""
    leave(not hasattr(sys, "last_type"))


@atexit.register
def _drain() -> None:
    """Let gloo's threads drop the tensors of their last collectives.

    They take the GIL for that, and a thread that asks for it while the interpreter shuts down aborts the process
    ("terminate called without an active exception"). Sleeping gives it away.
    """
    if world_size() > 1 and "gloo" in dist.get_backend():
        time.sleep(DRAIN_SECONDS)
