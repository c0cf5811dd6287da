"""Garbage collection around slow imports."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from trace_dist.utils.imports import MANY, importing


@pytest.mark.parametrize("number", [MANY, MANY // 2])
def test_what_many_imports_made_is_left_out(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few imports leave everything as it is: what is frozen is never given back."""
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"imported_{number}_{at}" for at in range(number)]
    before = gc.get_freeze_count()
    for name in names:
        (tmp_path / f"{name}.py").touch()
    with importing():
        assert not gc.isenabled()
        for name in names:
            __import__(name)
    assert gc.isenabled()
    assert (gc.get_freeze_count() > before) == (number >= MANY)
    for name in names:
        del sys.modules[name]


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
