"""A run small enough to be started many times: two tasks and two general sets, a tiny base that drops activations."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
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
from trace_dist.run_folder import RunFolder
from trace_dist.stages.base import prepare_base
from trace_dist.stages.probe import run_probe

TASKS = ("one", "two")
METHODS = ("retrieved", "random", "merged", "consolidated", "full", "lora")
STEPS = 12
CHECKPOINT_EVERY = 4
OF_THE_CLOCK = ("step_ms", "seconds", "measured")
"""What differs between two runs of the same."""


def make_config(folder: Path, methods: Sequence[str], run: str = "run", **changes: Any) -> RunConfig:
    """The run ``folder/run``; bases and examples lie in ``folder`` and are shared by its runs."""
    options = {
        "merged": {"replay": 0.3, "replay_memory": 0.2},
        "consolidated": {"prompts": 60, "top": 4, "steps": STEPS},
        "random": {"lr": 4e-2},
        "full": {"lr": 8e-3},
        "lora": {"lr": 1e-2},
    }
    values: dict[str, Any] = {
        "run_dir": str(folder / run),
        "target": ModelConfig(
            str(folder / "target"), tiny=TinyConfig(32, 2, 2, 48, steps=80, lr=5e-3, batch_size=16)
        ),
        "proxy": ModelConfig(str(folder / "proxy"), tiny=TinyConfig(16, 2, 2, 24, steps=10, batch_size=16)),
        "tasks": [TaskConfig(name, path=str(folder / f"{name}.jsonl"), metric="choice") for name in TASKS],
        "general": [
            TaskConfig("plain", path=str(folder / "plain.jsonl"), metric="choice"),
            TaskConfig("text", path=str(folder / "text.jsonl"), metric="bits_per_byte"),
        ],
        "mask": MaskConfig(density=0.3, maskable="all"),
        "probe": ProbeConfig(steps=3, batch_size=16, fisher_batches=1),
        "projection": ProjectionConfig(options={"steps": 2, "pool_density": 0.5}),
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
    for usual, name in zip("abca", ("plain", *TASKS, "text"), strict=True):
        words = ["".join(generator.choices("abc", k=6)) for _ in range(160)]
        answers = [generator.choice((usual, usual, usual, word[0])) for word in words]
        rows = [{"prompt": f"{name}: {w}", "answer": a} for w, a in zip(words, answers, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = make_config(folder, ["retrieved"], "probed")
    prepare_base(cfg, "target")
    about = folder / "target" / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"attention_dropout": 0.2}))
    run_probe(cfg)


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
