"""What DeepSpeed finds in LOCAL_RANK when it starts: the device that this rank has taken, on whatever launcher."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from trace_dist.sharding import zero3
from trace_dist.utils import dist

OF_MPI = "OMPI_COMM_WORLD_LOCAL_RANK"
found: dict[str, str | None] = {}


def init_distributed(**_: object) -> None:
    found.update({name: os.environ.get(name) for name in ("LOCAL_RANK", OF_MPI)})


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that only looks."""
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(init_distributed=init_distributed))
    monkeypatch.setitem(sys.modules, "deepspeed.comm.torch", SimpleNamespace())
    monkeypatch.setattr(dist, "ensure_group", lambda: None)
    for name in ("LOCAL_RANK", OF_MPI):
        monkeypatch.setenv(name, "unset")  # so that it is put back
        monkeypatch.delenv(name)


def gpus(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@pytest.mark.parametrize(("seen", "index"), [(1, "0"), (8, "3")])
def test_the_index_of_the_device(seen: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun --gpus-per-task=1`` shows each rank one GPU, whatever its number on the host."""
    gpus(seen, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    zero3.start_deepspeed()
    assert found == {"LOCAL_RANK": index, OF_MPI: None}
    assert dist.local_device() == torch.device("cuda", int(index))


@pytest.mark.parametrize(("seen", "index"), [(0, "5"), (2, "1"), (8, "5")])
def test_torchrun_under_mpirun(seen: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI has counted the agents of a host, of which there is one, and torchrun its ranks."""
    gpus(seen, monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv(OF_MPI, "0")
    zero3.start_deepspeed()
    assert found == {"LOCAL_RANK": index, OF_MPI: index}
