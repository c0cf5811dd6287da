"""What races: masked training, full fine-tuning, PEFT LoRA and PEFT SHiRA, each as its users run it under DeepSpeed ZeRO-3.

All train one model of one shape in bf16 with an fp32 master, on the same random batch, under DeepSpeed's own settings for
gathering weights. LoRA and SHiRA get the rank with which they train as many parameters as the masks do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trace_dist.benchmarks.peers import dense_engine, with_adapters
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.sharding.build import shard
from trace_dist.utils import dist

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MASKED = {"element": 1, "block 64": 64, "row": 0}
"""Masked contestants and their block size."""
CONTESTANTS = (*MASKED, "full", "LoRA", "SHiRA")


@dataclass(frozen=True)
class Race:
    """One model, one batch.

    Attributes:
        density: masked share of the linear layers' weights.
        micro_batch: examples per rank and step.
        sequence: tokens per example.
    """

    density: float = 0.05
    micro_batch: int = 4
    sequence: int = 128

    def model(self) -> PreTrainedModel:
        """Random weights, the same on every rank."""
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).bfloat16().train()

    def batch(self) -> dict[str, Tensor]:
        """This rank's batch."""
        generator = torch.Generator().manual_seed(dist.rank())
        shape = (self.micro_batch, self.sequence)
        ids = torch.randint(SMOLLM2_135M["vocab_size"], shape, generator=generator)
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Contestant:
    """A training step in three phases, and how many parameters it trains."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    num_trained: int


def build(name: str, race: Race) -> Contestant:
    """Set a contestant up on this job's ranks.

    Raises:
        ValueError: unknown contestant.
    """
    if name not in CONTESTANTS:
        raise ValueError(f"contestants={name!r}: unknown; use some of {', '.join(CONTESTANTS)}")
    return _masked(name, race) if name in MASKED else _peer(name, race)


def _masked(name: str, race: Race) -> Contestant:
    model = shard(race.model(), "zero3")
    granularity = name.split()[0]
    layouts = layouts_for(model, granularity, MASKED[name], "linear")
    optimizer = MaskedAdamW(
        model, random_mask(layouts, granularity, race.density, seed=0), lr=1e-4, max_grad_norm=1.0
    )
    batch = race.batch()

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Contestant(
        lambda: model(**batch).loss, model.backward, step, sum(len(s.grad) for s in optimizer.supports)
    )


def _peer(name: str, race: Race) -> Contestant:
    module: Any = race.model()
    if name != "full":
        module = with_adapters(name, module, race.density).bfloat16()
    engine, num_trained = dense_engine(module)
    batch = race.batch()
    return Contestant(lambda: engine(**batch).loss, engine.backward, engine.step, num_trained)
