"""Without a launcher there is one rank, and no collective needs a process group."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from trace_dist.utils import dist
from trace_dist.utils.env import commit_of, meta_info, run_info
from trace_dist.utils.log import get_logger, progress, setup_logging


def test_one_process() -> None:
    dist.init_distributed()
    assert not torch.distributed.is_initialized()
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    value = torch.tensor([1.0, 2.0])
    assert dist.sum_over_ranks(value) is value
    assert dist.max_over_ranks(2.5) == 2.5
    assert dist.gather_objects("a") == ["a"]
    assert dist.broadcast_object({"a": 1}) == {"a": 1}
    dist.barrier()


def test_a_group_of_one_can_be_made_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    dist.ensure_group()
    try:
        assert torch.distributed.is_initialized()
        assert (dist.rank(), dist.world_size()) == (0, 1)
    finally:
        dist.close()
    assert not torch.distributed.is_initialized()
    assert "RANK" not in os.environ  # Trainer would take this process for a rank that somebody launched
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_distributed()  # somebody has destroyed the group alone: nobody launched this process
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "NCCL error in: /torch/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: "
            "This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both "
            "on CUDA device 4e000",
            r"LOCAL_RANK=1: rank 1 of 2 has the GPU of another rank \(Duplicate GPU .* 4e000\); start no more ranks",
        ),
        (
            "NCCL error in: /torch/NCCLUtils.cpp:94, there was a network error\nLast error:\nsocketStart",
            r"NCCL: rank 1 of 2 cannot join the others \(socketStart\); .*set NCCL_SOCKET_IFNAME",
        ),
        ("connect() timed out", r"MASTER_ADDR=node-1, .* \(connect\(\) timed out\); name a machine that all"),
    ],
    ids=["one-gpu", "nccl", "place"],
)
def test_who_cannot_join_is_told_why(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL begins as ranks meet: what it said of GPUs had the cure of a place where nobody meets."""
    names = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node-1",
    }
    for name, value in names.items():
        monkeypatch.setenv(name, value)

    def meet(*_: object, **__: object) -> None:
        raise torch.distributed.DistBackendError(error)

    monkeypatch.setattr(torch.distributed, "init_process_group", meet)
    monkeypatch.setattr(dist, "_meet", lambda *_: None)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        dist.init_distributed()
    assert "\n" not in str(caught.value)


def test_a_rank_without_a_gpu_among_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a library waits for it: NCCL did so for as long as a collective may take."""
    store, minute = torch.distributed.HashStore(), timedelta(minutes=1)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setenv("RANK", "0")
    dist._meet(torch.device("cuda", 0), minute)
    monkeypatch.setenv("RANK", "1")
    dist._meet(torch.device("cuda", 3), minute)
    here = socket.gethostname()
    with pytest.raises(
        ValueError, match=rf"^RANK=1: computes on cpu on {here}, and rank 0 on cuda on {here}; "
    ):
        dist._meet(torch.device("cpu"), minute)


def test_on_gpus_cpu_tensors_have_a_backend_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a group that a launcher asked for, and of one that DeepSpeed needs."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    # NCCL is not there, and nobody is to meet.
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: made.append(backend))
    monkeypatch.setattr(dist, "_hurry_devices", lambda _: None)
    monkeypatch.setattr(dist, "_meet", lambda *_: None)
    for launched in (True, False):
        launch = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        for name, value in (launch | {"MASTER_PORT": "1"}).items():
            monkeypatch.setenv(name, value)
            if not launched:
                monkeypatch.delenv(name)
        dist.ensure_group()
    for backend in made:
        by_device = torch.distributed.BackendConfig(
            torch.distributed.Backend(backend)
        ).get_device_backend_map()
        assert by_device == {"cpu": "gloo", "cuda": "nccl"}
    assert len(made) == 3  # a group that nobody made is asked for once more


@pytest.mark.parametrize(
    ("default", "beside"), [("cpu:fake,cuda:fake", "cpu:fake,cuda:fake"), ("cuda:fake", "cpu:gloo,cuda:fake")]
)
def test_exchanges_have_a_group_of_their_own(
    default: str, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU tensors have a place in it, also where the default group has none for them."""
    made, real = [], torch.distributed.new_group

    def new_group(backend: str, **_: object) -> object:
        made.append(backend)
        return real(backend=backend.replace("gloo", "fake"))  # nobody is there for gloo to connect to

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    for _ in range(2):  # a new default group has a new one beside it
        torch.distributed.init_process_group(default, rank=0, world_size=2, store=FakeStore())
        group = dist.exchange_group()
        assert group is not torch.distributed.group.WORLD
        assert dist.exchange_group() is group
        dist.close()
    assert made == [beside] * 2


@pytest.mark.parametrize("told", [None, 45])
def test_accelerators_are_waited_for_ten_minutes_and_hosts_longer(
    told: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the default group and of those beside it. DEEPSPEED_TIMEOUT is for both."""
    hurried: list[timedelta] = []
    monkeypatch.setattr(dist, "_backend", lambda: "cpu:gloo,cuda:fake")  # which stands for NCCL
    monkeypatch.setattr(FakeProcessGroup, "name", lambda _: "nccl", raising=False)
    monkeypatch.setattr(
        FakeProcessGroup,
        "_set_default_timeout",
        lambda _, timeout: hurried.append(timeout),
        raising=False,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | place).items():
        monkeypatch.setenv(name, value)
    if told is not None:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", str(told))
    dist.init_distributed(dist.Waiting(timeout_minutes=30))
    try:
        groups = [torch.distributed.group.WORLD, dist.exchange_group()]
        hosts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        assert hosts == [timedelta(minutes=told or 30)] * 2
        assert hurried == ([] if told else [timedelta(minutes=10)] * 2)
    finally:
        dist.close()


def test_logs_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting", total=3)) == [0, 1, 2]
    logger = logging.getLogger("trace_dist")
    kept = logger.handlers[:], logger.level, logger.propagate
    try:
        setup_logging()
        setup_logging()  # twice: still one handler
        assert len(logger.handlers) == 1
        assert get_logger("trace_dist.x").isEnabledFor(logging.INFO)
        assert not get_logger("trace_dist.x").isEnabledFor(logging.DEBUG)
    finally:
        logger.handlers[:], logger.level, logger.propagate = kept


def test_what_a_result_was_made_with() -> None:
    about = meta_info()
    assert torch.__version__.startswith(about["versions"]["torch"].split("+")[0])
    assert {"python", "deepspeed", "transformers"} <= set(about["versions"])
    assert about["hardware"]
    assert run_info()["date"].endswith("+00:00")


def test_a_result_that_changed_is_no_change_of_the_code(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        author = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "package" / "code.py", tmp_path / "docs" / "results" / "found.json"
    for file in (code, result):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    assert commit_of(tmp_path) is None
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = commit_of(code.parent)
    result.write_text("2")
    assert commit_of(code.parent) == clean
    code.write_text("2")
    assert commit_of(code.parent) == f"{clean}+"


def test_ranks_that_cannot_meet_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else listens where rank 0 should."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(
            ValueError, match=rf"^MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={port}: rank 0 of 1 cannot"
        ):
            dist.init_distributed()


@pytest.mark.parametrize("minutes", ["0", "soon", "-3", ""])
def test_the_patience_of_a_rank_is_a_number_of_minutes(minutes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"^DEEPSPEED_TIMEOUT=.*: must be a number of minutes; use for example 60"
    ):
        dist.init_distributed()
