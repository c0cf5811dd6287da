"""Ranks open as many files as the hard limit allows, and are refused where that is too little."""

from __future__ import annotations

import resource

import pytest

from trace_dist.utils import dist
from trace_dist.utils.open_files import allow_connections


class Limits:
    """Limits of a process that is not this one."""

    def __init__(self, soft: int, hard: int, highest: int | None = None) -> None:
        self.soft, self.hard, self.highest = soft, hard, highest

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.soft, self.hard

    def set(self, which: int, values: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        if self.highest is not None:
            raise ValueError("not allowed to raise maximum limit")
        self.soft, self.hard = values


def limited(monkeypatch: pytest.MonkeyPatch, *limits: int) -> Limits:
    found = Limits(*limits)
    monkeypatch.setattr(resource, "getrlimit", found.get)
    monkeypatch.setattr(resource, "setrlimit", found.set)
    return found


@pytest.mark.parametrize("hard", [5376, 1 << 20, resource.RLIM_INFINITY])
def test_the_soft_limit_is_raised(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = limited(monkeypatch, 1024, hard)
    allow_connections(1024)
    assert (limits.soft, limits.hard) == (hard, hard)


@pytest.mark.parametrize(
    ("limits", "found"), [((1024, 5375), 5375), ((1024, 1024), 1024), ((1024, 9999, 1024), 1024)]
)
def test_too_few_are_refused(limits: tuple[int, ...], found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, *limits)
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    message = rf"^RLIMIT_NOFILE={found}: among 1024 ranks each opens up to 5376 .* on node-7 .* to 5376$"
    with pytest.raises(ValueError, match=message):
        allow_connections(1024)


def test_a_limit_that_stays_may_do(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = limited(monkeypatch, 4096, 9999, 4096)
    allow_connections(8)
    assert allowed.soft == 4096


def test_ranks_are_refused_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 64, 64)
    place = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RLIMIT_NOFILE=64: among 2 ranks"):
        dist.init_distributed()
