"""Training through ``train_mask`` with checkpoints, cut off on demand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from engine.cases import CASES, VOCAB, Case
from transformers import PreTrainedModel

from trace_dist.config import TrainConfig
from trace_dist.data.batches import Batches, Step
from trace_dist.optim.states import MOMENTS
from trace_dist.sharding import ShardedModel
from trace_dist.train.task import train_mask

STEPS = 9
PLAIN = CASES["element-everything"]
CONFIG = TrainConfig(
    steps=STEPS,
    lr=1e-2,
    batch_size=7,
    micro_batch_size=2,
    warmup_steps=2,
    weight_decay=0.1,
    eps=1e-5,
    checkpoint_every=3,
)


class Cut(Exception):
    """The process died."""


class MortalBatches(Batches):
    """Batches that raise Cut instead of giving step ``last + 1``."""

    last = STEPS

    def __next__(self) -> Step:
        if self._consumed >= self.last * CONFIG.batch_size:
            raise Cut
        return super().__next__()


def make_batches(last: int = STEPS) -> MortalBatches:
    """Eleven examples of 3 to 9 tokens, 1 to 5 of them answers."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for index in range(11):
        ids = torch.randint(3, VOCAB, (3 + index % 7,), generator=generator).tolist()
        answer = 1 + index % 5 if len(ids) > 5 else 1
        labels = [-100] * (len(ids) - answer) + ids[len(ids) - answer :]
        rows.append({"input_ids": ids, "labels": labels, "num_answer_tokens": answer})
    batches = MortalBatches(
        datasets.Dataset.from_list(rows),
        batch_size=CONFIG.batch_size,
        micro_batch_size=CONFIG.micro_batch_size,
        seed=0,
        pad_id=0,
    )
    batches.last = last
    return batches


def dropout_model() -> PreTrainedModel:
    """A GPT-2 that drops activations while it trains."""
    model = CASES["gpt2-conv1d"].model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    return model


@dataclass
class Resumed:
    """Losses by step, gradient norms, weights (rank 0) and this rank's optimizer state."""

    losses: dict[int, float]
    norms: list[float]
    state: dict[str, torch.Tensor]
    optimizer: list[torch.Tensor]


def run(model: ShardedModel, case: Case, folder: Path | None, last: int = STEPS) -> Resumed | None:
    """Train until the end, or until the process 'dies' after step ``last`` (then None); continues what ``folder`` holds.

    What it is to leave when it dies is written at once.
    """
    batches, cfg = make_batches(last), replace(CONFIG, checkpoint_async=last == STEPS)
    try:
        result, learner = train_mask(
            model, case.mask(model), batches, cfg, STEPS, description="test", checkpoints=folder
        )
    except Cut:
        return None
    states = [state for _, state in learner.optimizer.compact()]
    tensors = [state[moment] for state in states for moment in MOMENTS]
    tensors += map(learner.optimizer.values, learner.optimizer.supports)
    return Resumed(dict(result.losses), result.grad_norms, model.full_state_dict(), tensors)
