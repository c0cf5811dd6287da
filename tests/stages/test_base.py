"""Where the base models of a run are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trace_dist.config import ModelConfig, PruneConfig, RunConfig, TaskConfig
from trace_dist.stages import base


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    """A proxy that is cut out of the target and healed."""
    proxy = ModelConfig(str(tmp_path / "models" / "proxy"), prune=PruneConfig(heal_steps=2))
    tasks = [TaskConfig(name, f"{name}.jsonl") for name in ("t", "g")]
    target = ModelConfig(str(tmp_path / "target"))
    return RunConfig(target, tasks[:1], str(tmp_path / "run"), proxy=proxy, general=tasks[1:])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, beside which models are read and written."""
    done: list[str] = []

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "config.json").write_text("{}")

        save = save_pretrained

    def cut(source: Path, out: Path, *how: Any) -> None:
        done.append("cut")

    monkeypatch.setattr(base, "prune", cut)
    monkeypatch.setattr(base, "_pretrain", lambda *how: done.append("healed"))
    monkeypatch.setattr(base.Tasks, "load", lambda cfg: None)
    monkeypatch.setattr(base.Origin, "load", lambda folder: Saved())
    monkeypatch.setattr(base, "load_model", lambda *how: Saved())
    monkeypatch.setattr(base, "copy_rest", lambda *where: None)
    return done


def test_a_proxy_is_not_healed_in_vain(cfg: RunConfig, steps: list[str]) -> None:
    folder = Path(cfg.probed.path)
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="exists already; delete it"):
        base.prepare_base(cfg, "proxy")
    assert steps == []


def test_an_empty_folder_is_filled(cfg: RunConfig, steps: list[str]) -> None:
    Path(cfg.probed.path).mkdir(parents=True)
    assert base.prepare_base(cfg, "proxy") == Path(cfg.probed.path)
    assert steps == ["cut", "healed"]
    assert [path.name for path in Path(cfg.probed.path).iterdir()] == ["config.json"]
