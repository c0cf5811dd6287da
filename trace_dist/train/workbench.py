"""From the configuration's sections to tokenised tasks and batches; all data are checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import datasets
from transformers import PreTrainedTokenizerBase

from trace_dist.config import BankConfig, DataConfig, EvalConfig, ModelConfig, TaskConfig, TrainConfig
from trace_dist.data.batches import Batches, Step
from trace_dist.data.encoding import context_length
from trace_dist.data.examples import text_of
from trace_dist.data.modality import TEXT, Modality, load_modality
from trace_dist.data.tasks import Task, load_task
from trace_dist.models.architecture import read_config, vocabulary_size
from trace_dist.models.tiny import MAX_POSITIONS
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.models.weight_files import resolve
from trace_dist.train.checks import Reader, check_tasks
from trace_dist.utils.together import first_once_per_host


class Sections(Protocol):
    """What is read of a run's configuration."""

    @property
    def target(self) -> ModelConfig: ...
    @property
    def proxy(self) -> ModelConfig | None: ...
    @property
    def tasks(self) -> list[TaskConfig]: ...
    @property
    def general(self) -> Sequence[TaskConfig]: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def bank(self) -> BankConfig: ...
    @property
    def eval(self) -> EvalConfig: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Stream:
    """A task with its tokenised examples: to train on, and to validate on where the run does (None where it does not)."""

    task: Task
    encoded: datasets.Dataset
    steps: int
    validation: datasets.Dataset | None = None


@dataclass(frozen=True)
class Tasks:
    """The examples of a run."""

    tasks: list[Task]
    general: list[Task]

    @classmethod
    def load(cls, cfg: Sections) -> Tasks:
        """Read all examples, and check them for every model of the run that is known by now.

        Raises:
            ValueError: a source is missing or malformed, or the data make the run impossible.
        """
        loaded = cls(
            [load_task(task, cfg.seed, validate=cfg.train.eval_every > 0) for task in cfg.tasks],
            [load_task(task, cfg.seed) for task in cfg.general],
        )
        check_tasks(
            loaded.tasks,
            loaded.general,
            list(loaded._readers(cfg)),
            data=cfg.data,
            evaluation=cfg.eval,
            bank=cfg.bank,
        )
        return loaded

    def characters(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a tiny base over these examples."""
        tasks = [*self.general, *self.tasks]
        return char_tokenizer(
            {
                task.name: [text_of(prompt) for part in task.parts for prompt in part["prompt"][:]]
                for task in tasks
            },
            [answer for task in tasks for part in task.parts for answer in part["answer"][:]],
        )

    def _readers(self, cfg: Sections) -> Iterator[Reader]:
        """The run's models that are there, and tiny ones, which are known before they are made."""
        for role, model in (("target", cfg.target), ("proxy", cfg.proxy)):
            if model is None:
                continue
            if (Path(model.path) / "config.json").is_file() or not model.made:
                tokenizer = load_modality(cfg.data.modality).load_reader(model.path)
                config = read_config(resolve(model.path), f"{role}.path={model.path!r}")
                layers = getattr(config.get_text_config(), "num_hidden_layers", None)
                known = vocabulary_size(config) if cfg.data.modality == TEXT else None
                yield Reader(role, tokenizer, context_length(config), layers, role == "target", known)
            elif model.tiny is not None:
                layers = model.tiny.num_layers
                yield Reader(role, self.characters(), MAX_POSITIONS, layers, role == "target")
            elif model.vit is not None:
                yield Reader(role, None, None, model.vit.num_layers, role == "target")


@dataclass(frozen=True)
class Workbench:
    """Everything about data that the stages of a run share."""

    cfg: Sections
    tokenizer: Any
    """What reads examples: a tokenizer, or what another modality has in its place (``Modality.load_reader``)."""
    tasks: list[Stream]
    general: list[Stream]

    @classmethod
    def load(cls, cfg: Sections, model_path: str | Path, plain: bool = False) -> Workbench:
        """Read and check all tasks, and tokenise them with a model's tokenizer, once on each host. Collective.

        Args:
            cfg: which tasks.
            model_path: folder or hub id of the model.
            plain: leave out the tokenizer's chat template.

        Raises:
            ValueError: as ``Tasks.load``.
        """
        return first_once_per_host(lambda: cls._load(cfg, model_path, plain))

    @classmethod
    def _load(cls, cfg: Sections, model_path: str | Path, plain: bool) -> Workbench:
        loaded = Tasks.load(cfg)
        modality = load_modality(cfg.data.modality)
        tokenizer = modality.load_reader(model_path)
        if plain:
            tokenizer.chat_template = None
        steps = {task.name: task.steps or cfg.train.steps for task in (*cfg.tasks, *cfg.general)}

        def stream(task: Task) -> Stream:
            validation = (
                None if task.validation is None else modality.encode(task.validation, tokenizer, cfg.data)
            )
            return Stream(
                task, modality.encode(task.train, tokenizer, cfg.data), steps[task.name], validation
            )

        return cls(cfg, tokenizer, list(map(stream, loaded.tasks)), list(map(stream, loaded.general)))

    @property
    def modality(self) -> Modality:
        """What an example is."""
        return load_modality(self.cfg.data.modality)

    def before(self, stream: Stream) -> list[Stream]:
        """The tasks before one, or before the one that it is a part of."""
        return list(takewhile(lambda other: other.task.name != stream.task.name, self.tasks))

    def upto(self, stream: Stream) -> list[Stream]:
        """The tasks up to one, which is the last and whole."""
        return self.tasks[: len(self.before(stream)) + 1]

    def batches(
        self,
        streams: Sequence[Stream],
        batch_size: int,
        replay: Sequence[Stream] = (),
        replay_share: float = 0.0,
        replay_memory: float = 1.0,
        seed: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> Batches:
        """Batches over the union of some streams, with a share of replayed examples from others.

        Args:
            streams: what is learned.
            batch_size: examples per global batch.
            replay: what is replayed.
            replay_share: share of each batch that is replayed.
            replay_memory: share of the training examples of each of them that is kept for it.
            seed: of the order; the run's when None.
            weights: how often each of the replayed ones is drawn; equally often when None.
        """
        weights = [1.0] * len(replay) if weights is None else weights
        return Batches(
            _union([stream.encoded for stream in streams]),
            batch_size=batch_size,
            micro_batch_size=self.cfg.train.micro_batch_size,
            seed=self.cfg.seed if seed is None else seed,
            **self.modality.batching(self.tokenizer),
            replay=[
                (_remembered(stream, replay_memory), weight)
                for stream, weight in zip(replay, weights, strict=True)
            ],
            replay_share=replay_share if replay else 0.0,
            packing=self.cfg.data.packing,
        )

    def one_batch(self, examples: Sequence[datasets.Dataset]) -> Step:
        """All examples of some encoded datasets as one global batch; the order does not matter to what is computed on it."""
        union = _union(examples)
        return next(
            Batches(
                union,
                batch_size=len(union),
                micro_batch_size=self.cfg.train.micro_batch_size,
                seed=self.cfg.seed,
                **self.modality.batching(self.tokenizer),
            )
        )


def _union(examples: Sequence[datasets.Dataset]) -> datasets.Dataset:
    return examples[0] if len(examples) == 1 else datasets.concatenate_datasets(examples)


def _remembered(stream: Stream, share: float) -> datasets.Dataset:
    """The examples of a task that are kept for replay: the first ones, at least one."""
    return stream.encoded.select(range(max(1, round(share * len(stream.encoded)))))
