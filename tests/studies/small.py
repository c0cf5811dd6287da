"""A study on tiny models."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.config import (
    ContinualConfig,
    ModelConfig,
    ProbeConfig,
    ProjectionConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from trace_dist.models import char_tokenizer
from trace_dist.models.prune import prune
from trace_dist.models.width import Widths
from trace_dist.studies.page import RESULT
from trace_dist.studies.plan import StageConfig, StudyConfig

DENSITIES = [0.02, 0.2]


@dataclass(frozen=True)
class Setup:
    cfg: RunConfig
    study: StudyConfig


def make_setup(folder: Path) -> Setup:
    """Data, a target, a proxy that was cut out of it, and a study of them, in an empty folder."""
    generator = random.Random(0)
    prompts: dict[str, list[str]] = {}
    for name, answer in (("first", 0), ("last", -1), ("plain", 1)):
        words = ["".join(generator.choices("abcd", k=4)) for _ in range(120)]
        rows = [{"prompt": word, "answer": word[answer]} for word in words]
        prompts[name] = words
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = char_tokenizer(prompts, "abcd")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **sizes, num_key_value_heads=2))
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    prune(folder / "target", folder / "proxy", 2, Widths(hidden=8, intermediate=16))
    cfg = RunConfig(
        run_dir=str(folder / "run"),
        target=ModelConfig(str(folder / "target")),
        proxy=ModelConfig(str(folder / "proxy")),
        tasks=[TaskConfig("first", path=str(folder / "first.jsonl"), num_test=12)],
        general=[TaskConfig("plain", path=str(folder / "plain.jsonl"), num_test=12)],
        probe=ProbeConfig(steps=2, batch_size=8, fisher_batches=2),
        projection=ProjectionConfig(options={"steps": 2, "pool_density": 0.5}),
        train=TrainConfig(steps=4, batch_size=8, micro_batch_size=8, warmup_steps=1),
        continual=ContinualConfig(options={"lora": {"rank": 1}}),
    )
    local = [
        TaskConfig(name, path=str(folder / f"{name}.jsonl"), num_test=12) for name in ("last", "missing")
    ]
    study = StudyConfig(
        [
            StageConfig(["random", "probed"], DENSITIES),
            StageConfig(["lora", "projected"], DENSITIES, seeds=2),
        ],
        local_tasks=local,
        max_rates=3,
        validation=8,
        num_texts=6,
        out=str(folder / RESULT),
    )
    return Setup(cfg, study)
