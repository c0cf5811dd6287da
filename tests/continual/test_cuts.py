"""A sequence that is cut goes on, whatever the method: here all that no other file cuts, so that a new one is not left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from continual.cuts import FROZEN, RATES, cut_at_every_border, finished, one_method
from continual.small import METHODS as KILLED

from trace_dist.config import RunConfig
from trace_dist.parts import METHODS

OPTIONS: dict[str, dict[str, Any]] = {"ties": {"keep": 0.5}, "dare": {"drop": 0.3, "seed": 5}}
# Processes are killed in test_resuming; rivals are cut in test_rivals; what is for classes in modality/test_cut.
REST = [name for name in METHODS if name not in (*KILLED, *RATES, *FROZEN)]


def probed(folder: Path, name: str, run: str) -> RunConfig:
    """A run of its own, with the probe's results and the bank that ``retrieved`` has filled."""
    shutil.copytree(folder / "probed", folder / run)
    shutil.copytree(folder / "whole" / "bank", folder / run / "bank")
    return one_method(folder, name, run, OPTIONS.get(name, {}))


def files(cfg: RunConfig, name: str) -> dict[str, bytes]:
    """What a method leaves beside its result: one set of weights, or a bank of its own."""
    bank = cfg.folder.bank(name).root
    paths = [*bank.rglob("*.safetensors"), *cfg.folder.root.glob(f"{name}.safetensors")]
    return {path.relative_to(cfg.folder.root).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", REST)
def test_cut_at_every_border_it_ends_as_the_uncut_one(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (probed(folder, name, f"{life}-{name}") for life in ("uncut", "cut"))
    expected = finished(whole)
    cut_at_every_border(cut, monkeypatch)
    assert finished(cut) == expected
    assert files(cut, name) == files(whole, name) != {}
    assert not cut.folder.progress(name).exists()
