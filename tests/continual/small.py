"""A run small enough to be started many times: two tasks and two general sets, a tiny base that drops activations."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import (
    BankConfig,
    ContinualConfig,
    MaskConfig,
    ModelConfig,
    ProbeConfig,
    ProjectionConfig,
    RunConfig,
    TaskConfig,
    TinyConfig,
    TrainConfig,
)
from trace_dist.probe.probe import run_probe
from trace_dist.run_folder import RunFolder
from trace_dist.train.bases import prepare_base

TASKS = ("first", "last")
STEPS = 8
CHECKPOINT_EVERY = 4
OF_THE_CLOCK = ("step_ms", "seconds", "measured")
"""What differs between two runs of the same."""


def make_config(folder: Path, methods: Sequence[str], run: str = "run", **changes: Any) -> RunConfig:
    """The run ``folder/run``; bases and examples lie in ``folder`` and are shared by its runs."""
    options = {"merged": {"replay": 0.3, "replay_memory": 0.2}, "lora": {"lr": 1e-2}, "random": {"lr": 2e-2}}
    values: dict[str, Any] = {
        "run_dir": str(folder / run),
        "target": ModelConfig(str(folder / "target"), tiny=TinyConfig(32, 2, 2, 48, steps=40, batch_size=16)),
        "proxy": ModelConfig(str(folder / "proxy"), tiny=TinyConfig(16, 2, 2, 24, steps=10, batch_size=16)),
        "tasks": [TaskConfig(name, path=str(folder / f"{name}.jsonl"), metric="choice") for name in TASKS],
        "general": [
            TaskConfig("plain", path=str(folder / "plain.jsonl"), metric="choice"),
            TaskConfig("text", path=str(folder / "text.jsonl"), metric="bits_per_byte"),
        ],
        "mask": MaskConfig(density=0.1),
        "probe": ProbeConfig(steps=3, batch_size=16, fisher_batches=1),
        "projection": ProjectionConfig(narrow_steps=2, pool_density=0.3),
        "train": TrainConfig(
            steps=STEPS,
            lr=2e-2,
            batch_size=16,
            micro_batch_size=16,
            warmup_steps=2,
            checkpoint_every=CHECKPOINT_EVERY,
        ),
        "continual": ContinualConfig(
            list(methods), {name: options[name] for name in methods if name in options}
        ),
        "bank": BankConfig(clusters=2, num_prompts=30, layer=0),
    }
    return RunConfig(**{**values, **changes})


def prepare(folder: Path) -> None:
    """Write the examples, make the bases, and probe the proxy; runs copy ``folder/probed``."""
    generator = random.Random(0)
    for name in (*TASKS, "plain", "text"):
        words = ["".join(generator.choices("abc", k=4)) for _ in range(60)]
        answers = [{"first": word[0], "last": word[-1]}.get(name, word[1]) for word in words]
        rows = [{"prompt": f"{name}: {w}", "answer": a} for w, a in zip(words, answers, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = make_config(folder, ["retrieved"], "probed")
    prepare_base(cfg.target, cfg, "target")
    about = folder / "target" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"attention_dropout": 0.2}))
    run_probe(cfg)


def with_options(cfg: RunConfig, **options: dict[str, Any]) -> RunConfig:
    """The run with other options of its methods."""
    return replace(cfg, continual=replace(cfg.continual, options=options))


def result(cfg: RunConfig, method: str) -> dict[str, Any]:
    """A method's result."""
    return json.loads(RunFolder.of(cfg.run_dir).method(method).read_text())


def outcome(cfg: RunConfig, method: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """All that must be the same however often a run was cut: its result, and the files of its bank."""
    found = {key: value for key, value in result(cfg, method).items() if key not in OF_THE_CLOCK}
    folder = RunFolder.of(cfg.run_dir).bank(method).root
    if not folder.is_dir():
        return found, {}
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    assert DeltaBank(folder).tasks == ["base", *TASKS]
    return found, {name: path.read_bytes() for name, path in files.items()}
