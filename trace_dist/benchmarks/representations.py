"""Representations of many tasks' prompts under a small real model, kept on disk task by task.

A representation is pooled from a hidden layer, so what lies above the highest layer asked for is cut off and never runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trace_dist.bank.representation import represent_views
from trace_dist.config import BankConfig, DataConfig, EvalConfig, ModelConfig, TaskConfig
from trace_dist.config.bank import Pooling, View
from trace_dist.data.encoding import encode_prompt, pad_id
from trace_dist.data.sources import load_examples
from trace_dist.models import convert_gguf, load_model, load_tokenizer
from trace_dist.utils import dist
from trace_dist.utils.files import load_tensors, save_tensors

SPLITS = ("train", "test", "shifted")
Views = Mapping[View, Tensor]
"""[N, D] fp32 of each."""


@dataclass(frozen=True)
class RetrievalSettings:
    """What a study reads: sections of a run's configuration, and what is measured beside."""

    folder: Path
    """Where representations are kept."""
    model: ModelConfig
    data: DataConfig
    bank: BankConfig
    evaluation: EvalConfig
    tasks: tuple[TaskConfig, ...] = field(repr=False)
    seed: int
    layers: tuple[int, ...] = (0, 4, 8)
    """Hidden layers that are kept, ``bank.layer`` among them; under every pooling."""
    num_shifted: int = 16
    """Test prompts of a task that are also asked in other words."""
    shift: str = "Could you help me with the following?\n\n{prompt}\n\nThink about it first."
    """The other words."""

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise ValueError(f"tasks: {len(self.tasks)}, must be at least 2 to be told apart; add tasks")
        if self.bank.layer not in self.layers:
            raise ValueError(
                f"bank.layer={self.bank.layer!r}: this study keeps {self.layers}; choose one of them"
            )
        self.bank.view  # noqa: B018 - raises where one is to be chosen

    @property
    def views(self) -> list[View]:
        """All that is kept."""
        return [(layer, pooling) for layer in self.layers for pooling in get_args(Pooling)]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> RetrievalSettings:
        """From a run's configuration, as it is written."""
        return cls(
            folder=Path(config["run_dir"]),
            model=ModelConfig(**config["target"]),
            data=DataConfig(**config.get("data", {})),
            bank=BankConfig(**config.get("bank", {})),
            evaluation=EvalConfig(**config.get("eval", {})),
            tasks=tuple(TaskConfig(**task) for task in config["tasks"]),
            seed=config.get("seed", 0),
        )


@dataclass(frozen=True)
class Represented:
    """One task's prompts by view, of each split, and their tokens."""

    name: str
    train: Views
    test: Views
    shifted: Views
    num_tokens: tuple[int, ...]
    """Of the test prompts, uncut."""


def shortened(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """The model without what lies above a hidden layer; its hidden states up to there are as before.

    Raises:
        ValueError: the model has no ``model.layers`` and ``model.norm``, or fewer layers.
    """
    decoder = getattr(model, "model", None)
    if decoder is None or not hasattr(decoder, "layers") or not hasattr(decoder, "norm"):
        raise ValueError(
            f"model: {type(model).__name__} has no model.layers; choose one of the Llama family for this study"
        )
    if not 0 <= num_layers < len(decoder.layers):
        raise ValueError(f"layers: {num_layers}, must lie in [0, {len(decoder.layers)}); choose lower ones")
    # at least one layer stays: attention masks are made for it
    decoder.layers = decoder.layers[: max(1, num_layers)]
    decoder.norm = nn.Identity()
    return model


class Reader:
    """The model, loaded when a task is not on disk yet."""

    def __init__(self, plan: RetrievalSettings) -> None:
        self._plan = plan
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    @property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer; converted from the package that carries them where that was not done."""
        if self._loaded is None:
            source, path = self._plan.model, Path(self._plan.model.path)
            if source.gguf is not None and not (path / "config.json").is_file():
                convert_gguf(source.gguf, path)
            model: Any = shortened(load_model(path, source.dtype), max(self._plan.layers))
            self._loaded = model.to(dist.local_device()), load_tokenizer(path)
        return self._loaded

    def represent(self, prompts: Sequence[str]) -> Views:
        """By every view."""
        model, tokenizer = self.loaded
        layers = self._plan.layers
        found = represent_views(
            model,
            encode_prompt(list(prompts), tokenizer, self._plan.data.max_length),
            layers=layers,
            poolings=get_args(Pooling),
            batch_size=self._plan.evaluation.batch_size,
            pad_id=pad_id(tokenizer),
        )
        return {
            (layer, pooling): found[pooling][:, layers.index(layer)] for layer, pooling in self._plan.views
        }

    def read(self, task: TaskConfig) -> Represented:
        """A task's representations, from disk where they lie there whole."""
        plan = self._plan
        about = [vars(plan.model), vars(plan.data), plan.layers, plan.num_shifted, plan.shift, plan.seed]
        digest = hashlib.sha256(json.dumps([about, vars(task)], default=str).encode()).hexdigest()[:16]
        path = plan.folder / "representations" / f"{task.name}-{digest}.safetensors"
        with suppress(ValueError):  # not there, or damaged
            tensors, header = load_tensors(path, "representations")
            kept = {
                split: {view: tensors[_key(split, view)].clone() for view in plan.views} for split in SPLITS
            }
            return Represented(task.name, num_tokens=tuple(header["num_tokens"]), **kept)
        found = self._made(task)
        header = {"format": "trace_dist.representations", "num_tokens": list(found.num_tokens)}
        tensors = {_key(split, view): x for split in SPLITS for view, x in getattr(found, split).items()}
        save_tensors(path, {key: x.contiguous() for key, x in tensors.items()}, header)
        return found

    def _made(self, task: TaskConfig) -> Represented:
        examples = load_examples(task, self._plan.seed)
        train, test = ([each["prompt"] for each in part] for part in (examples.train, examples.test))
        shifted = [self._plan.shift.format(prompt=prompt) for prompt in test[: self._plan.num_shifted]]
        lengths = tuple(map(len, encode_prompt(test, self.loaded[1])))
        with torch.no_grad():
            splits = {s: self.represent(p) for s, p in zip(SPLITS, (train, test, shifted), strict=True)}
        return Represented(task.name, num_tokens=lengths, **splits)


def _key(split: str, view: View) -> str:
    layer, pooling = view
    return f"{split}.{layer}.{pooling}"
