"""A run whose training diverges keeps nothing broken, and the advice that it gives works."""

from __future__ import annotations

from pathlib import Path

import torch
from cli.program import error_line, files, make_config, run_here, write_config, write_tasks

from trace_dist.bank.delta import Delta
from trace_dist.masks import Mask, UnitLayout


def test_a_lower_rate_in_the_same_folder(tmp_path: Path) -> None:
    """A base diverges, then a task in its last step; each is started again as the message says."""
    write_tasks(tmp_path)
    config, cache, folder = make_config(tmp_path), tmp_path / "cache", tmp_path / "run"
    config["target"]["tiny"]["lr"] = 1e38
    config["train"] |= {"lr": 1e38, "scheduler": "constant", "checkpoint_every": 1, "log_every": 1}
    path = write_config(tmp_path, config)
    base = ["base", "--config", path, "--which", "target"]
    line = error_line(run_here(*base, cache=cache))
    assert "error: target.tiny.lr=1e+38: pretrain target: the " in line
    assert "lower target.tiny.lr and start the same command again" in line
    assert not [file for file in files(folder) if file.startswith("models")]
    base += ["--target.tiny.lr", "1e-3"]
    done = run_here(*base, cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]

    name, units = "model.layers.0.mlp.up_proj.weight", torch.arange(48, dtype=torch.int32)
    Mask({name: units}, {name: UnitLayout((48, 32), 32)}, "row").save(tmp_path / "mask.safetensors")
    train = ["train", "--config", path, "--mask_file", tmp_path / "mask.safetensors", *base[-2:]]
    line = error_line(run_here(*train, "--train.steps", "2", cache=cache))
    assert "error: train.lr=1e+38: train/copy: " in line
    assert "lower train.lr and start the same command again" in line
    assert not (folder / "deltas").exists()
    done = run_here(*train, "--train.steps", "2", "--train.lr", "1e-3", cache=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    delta = Delta.load(folder / "deltas" / "copy.safetensors")
    assert all(bool(torch.isfinite(values).all()) for values in delta.values.values())
