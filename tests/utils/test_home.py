"""Paths that begin with ``~``, also of a user without a home."""

from __future__ import annotations

from pathlib import Path

import pytest

from trace_dist.config import BankConfig
from trace_dist.config.examples import example_file
from trace_dist.config.task import TaskConfig
from trace_dist.data.splits import validation_file
from trace_dist.utils.home import from_home


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container that runs under a number which no user has."""

    def unknown(number: int) -> None:
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_the_home_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert [from_home(path) for path in ("~/a", "~", "b/~", "/c")] == [
        Path("/home/me/a"),
        Path("/home/me"),
        Path("b/~"),
        Path("/c"),
    ]


def test_a_name_that_begins_so_is_a_name() -> None:
    """``~draft.jsonl`` is the home of no user."""
    assert from_home("~draft.jsonl") == Path("~draft.jsonl")
    assert example_file("~draft.jsonl", "path") == Path("~draft.jsonl")
    assert validation_file(TaskConfig("a", path="~draft.jsonl")) is None


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_told() -> None:
    with pytest.raises(ValueError, match=r"'~/a': ~ stands for the user's home.*; set HOME, or"):
        from_home("~/a")
    with pytest.raises(ValueError, match=r"bank.path='~/bank': ~ stands for"):
        BankConfig(path="~/bank")
    assert from_home("/a") == Path("/a")
