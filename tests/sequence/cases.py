"""What ranks that share rows train: small models of several kinds of attention, masks of every kind, rows of odd lengths."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from engine.cases import FAMILIES, VOCAB, Case
from train.rows import taught

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches, Step
from trace_dist.sharding import ShardedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.soft import SoftBatches, SoftLearner
from trace_dist.train.task import train_mask

STEPS = 4
LENGTHS = (3, 11, 5, 2, 7, 4, 9, 13, 2, 6, 17)
CONFIG = TrainConfig(
    steps=STEPS, lr=1e-2, batch_size=7, micro_batch_size=2, warmup_steps=1, weight_decay=0.1, eps=1e-5
)


@dataclass(frozen=True)
class Shared:
    """One training: a case of the engine's tests with other options of its config, and of its batches.

    ``options``: of the transformers config; four query heads unless they say otherwise.
    """

    name: str
    granularity: str
    family: str = "llama"
    maskable: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    packing: bool = False
    checkpointing: bool = False
    soft: bool = False
    backend: str = "zero3"
    dtype: str = "float32"

    @property
    def case(self) -> Case:
        """The model and its mask."""
        return Case(self.name, self.granularity, self.name, self.maskable, dtype=self.dtype)

    def model(self) -> Any:
        """Its attention is torch's."""
        sizes = {"n_head": 4} if self.family == "gpt2" else {"num_attention_heads": 4, "hidden_size": 40}
        FAMILIES[self.name] = {**FAMILIES[self.family], **sizes, **self.options}
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(self.family, **FAMILIES[self.name])
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, self.dtype), attn_implementation="sdpa"
            )
            for name, parameter in model.named_parameters():
                parameter.data.normal_(1.0 if parameter.dim() == 1 and "bias" not in name else 0.0, 0.1)
        return model.train()

    def batches(self, kind: type[Batches] = Batches, **options: Any) -> Batches:
        """Global batches of seven rows, two at a time."""
        return (SoftBatches if self.soft else kind)(
            rows(), batch_size=7, micro_batch_size=2, seed=5, pad_id=0, packing=self.packing, **options
        )


CASES = {
    case.name: case
    for case in (
        Shared("heads", "element", options={"num_key_value_heads": 4}),
        Shared("recomputed", "row", options={"num_key_value_heads": 2}, checkpointing=True),
        # One key head, which all ranks need.
        Shared("one-key-head", "block", "qwen2"),
        # A window of three tokens on every other layer, over slices of more and of fewer.
        Shared(
            "window",
            "row",
            "gemma3_text",
            options={"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        Shared("positions", "block", "gpt2"),
        Shared("packed", "element", options={"num_key_value_heads": 4}, packing=True),
        Shared(
            "packed-window",
            "block",
            "gemma3_text",
            options={"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
            packing=True,
        ),
        Shared("taught", "element", options={"num_key_value_heads": 4}, soft=True),
        Shared("fsdp2", "row", options={"num_key_value_heads": 2}, backend="fsdp2"),
        Shared("experts", "column", "qwen2_moe", maskable="linear"),
        Shared("bfloat16", "element", options={"num_key_value_heads": 4}, dtype="bfloat16"),
    )
}


class Cut(Exception):
    """The ranks died."""


class MortalBatches(Batches):
    """Two steps, and then the end of the ranks."""

    def __next__(self) -> Step:
        if self._consumed >= 2 * CONFIG.batch_size:
            raise Cut
        return super().__next__()


def rows() -> datasets.Dataset:
    """Examples of odd lengths; labels begin in the prompt of none, and lie on every border between slices in some."""
    generator = torch.Generator().manual_seed(3)
    return datasets.Dataset.from_list(
        [taught(generator, length, length - 1 if length % 3 else 1, VOCAB) for length in LENGTHS]
    )


@dataclass
class Outcome:
    """Losses and gradient norms of every step, and, on rank 0, all weights afterwards."""

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]


def resumed(model: ShardedModel, folder: Path, kind: type[Batches] = Batches) -> Outcome:
    """The case ``heads`` with a checkpoint after two steps, from the one that is there."""
    case, cfg = CASES["heads"], replace(CONFIG, checkpoint_every=2, checkpoint_async=False)
    mask, batches = case.case.mask(model), case.batches(kind)
    result, _ = train_mask(model, mask, batches, cfg, STEPS, description="resumed", checkpoints=folder)
    return Outcome([loss for _, loss in result.losses], result.grad_norms, model.full_state_dict())


def train(case: Shared, model: ShardedModel) -> Outcome:
    """Through the loop that the commands use."""
    cfg = replace(CONFIG, activation_checkpointing=case.checkpointing)
    learner = (SoftLearner if case.soft else MaskedLearner)(model, case.case.mask(model), cfg)
    result = train_steps(learner, case.batches(), cfg, STEPS)
    return Outcome([loss for _, loss in result.losses], result.grad_norms, model.full_state_dict())
