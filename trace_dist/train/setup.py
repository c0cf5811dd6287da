"""From the configuration's sections to tokenised tasks and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import datasets
from transformers import AutoConfig, PreTrainedTokenizerBase

from trace_dist.config import DataConfig, TaskConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.data.encoding import check_context, encode, pad_id
from trace_dist.data.tasks import Task, load_task
from trace_dist.models.loading import load_tokenizer


class Sections(Protocol):
    """What is read of a run's configuration."""

    @property
    def tasks(self) -> list[TaskConfig]: ...
    @property
    def general(self) -> list[TaskConfig]: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Stream:
    """A task with its tokenised training examples."""

    task: Task
    encoded: datasets.Dataset
    steps: int


def load_stream(task: TaskConfig, cfg: Sections, tokenizer: PreTrainedTokenizerBase) -> Stream:
    """Load and tokenise one task.

    Raises:
        ValueError: the source is missing or malformed, or an example is too long.
    """
    loaded = load_task(task, cfg.seed)
    return Stream(loaded, encode(loaded.train, tokenizer, cfg.data), task.steps or cfg.train.steps)


@dataclass(frozen=True)
class Workbench:
    """Everything about data that the stages of a run share."""

    cfg: Sections
    tokenizer: PreTrainedTokenizerBase
    tasks: list[Stream]
    general: list[Stream]

    @classmethod
    def load(cls, cfg: Sections, model_path: str | Path) -> Workbench:
        """Read all tasks with a model's tokenizer, and check that they fit its context."""
        tokenizer = load_tokenizer(model_path)
        tasks = [load_stream(task, cfg, tokenizer) for task in cfg.tasks]
        general = [load_stream(task, cfg, tokenizer) for task in cfg.general]
        longest = max(max(map(len, stream.encoded["input_ids"])) for stream in (*tasks, *general))
        check_context(longest, AutoConfig.from_pretrained(model_path))
        return cls(cfg, tokenizer, tasks, general)

    def batches(
        self,
        streams: Sequence[Stream],
        batch_size: int,
        replay: Sequence[Stream] = (),
        replay_share: float = 0.0,
        replay_memory: float = 1.0,
        seed: int | None = None,
    ) -> Batches:
        """Batches over the union of some streams, with a share of replayed examples from others.

        Args:
            streams: what is learned.
            batch_size: examples per global batch.
            replay: what is replayed.
            replay_share: share of each batch that is replayed.
            replay_memory: share of the training examples of each of them that is kept for it.
            seed: of the order; the run's when None.
        """
        encoded = [stream.encoded for stream in streams]
        return Batches(
            encoded[0] if len(encoded) == 1 else datasets.concatenate_datasets(encoded),
            batch_size=batch_size,
            micro_batch_size=self.cfg.train.micro_batch_size,
            seed=self.cfg.seed if seed is None else seed,
            pad_id=pad_id(self.tokenizer),
            replay=[(_remembered(stream, replay_memory), 1.0) for stream in replay],
            replay_share=replay_share if replay else 0.0,
        )


def _remembered(stream: Stream, share: float) -> datasets.Dataset:
    """The examples of a task that are kept for replay: the first ones, at least one."""
    return stream.encoded.select(range(max(1, round(share * len(stream.encoded)))))
