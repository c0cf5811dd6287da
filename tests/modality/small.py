"""A run on images, small enough to be started many times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_dist.config import (
    BankConfig,
    ContinualConfig,
    DataConfig,
    MaskConfig,
    ModelConfig,
    ProbeConfig,
    ProjectionConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    VitConfig,
)

CLASSES = (("4", "2"), ("7", "6"))
VIT = VitConfig(
    hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, pretrain="images:digits", steps=200, lr=5e-3, batch_size=32,
)  # fmt: skip


def make_config(folder: Path, methods: Sequence[str], run: str = "run", **changes: Any) -> RunConfig:
    """The run ``folder/run``; the base lies in ``folder`` and is shared by its runs."""
    values: dict[str, Any] = {
        "run_dir": str(folder / run),
        "target": ModelConfig(str(folder / "target"), vit=VIT),
        "tasks": [
            TaskConfig(
                f"of_{'_'.join(answers)}",
                path="images:digits",
                answers=list(answers),
                metric="top1",
                num_train=200,
                num_test=60,
            )
            for answers in CLASSES
        ],
        "data": DataConfig(modality="image"),
        "mask": MaskConfig(density=0.3),
        "probe": ProbeConfig(steps=3, batch_size=16, fisher_batches=1),
        "projection": ProjectionConfig(options={"steps": 2, "pool_density": 0.5}),
        "train": TrainConfig(steps=20, lr=1e-2, batch_size=16, micro_batch_size=8, warmup_steps=2),
        "continual": ContinualConfig(list(methods), options={"random_features": {"features": 300}}),
        "bank": BankConfig(clusters=2, num_prompts=120, layer=1),
    }
    return RunConfig(**{**values, **changes})
