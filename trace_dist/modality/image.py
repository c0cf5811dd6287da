"""``image``: pictures, answered with their class by an image classifier of transformers.

[Note: heads of tasks] The head of the base has a row for every class, small and random. A task's mask always holds the rows
of its own classes, so a delta carries the head of its task, and the rows of other classes stay the base's. The loss is the
softmax over all rows. Where a delta answers, it chooses among the classes of the task that was retrieved; no task id is given.
Weights that have learned several tasks choose among all classes.

A picture is represented by the class token and the mean patch of each of its quarters: what lies where tells classes apart, and
a mean over all patches forgets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor

from trace_dist.config import DataConfig, EvalConfig, MaskConfig
from trace_dist.config.bank import Pooling
from trace_dist.data.encoding import IGNORE
from trace_dist.data.pictures import check_picture, picture_of, png_of, uri_of
from trace_dist.data.tasks import Task
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.models.architecture import cause, read_config
from trace_dist.models.roles import full_shape
from trace_dist.models.vit import HEAD
from trace_dist.models.weight_files import resolve
from trace_dist.utils.devices import sent
from trace_dist.utils.files import MALFORMED

keeps_prompts = False
poolings: tuple[Pooling, ...] = ("mean",)
QUARTERS = 2
"""Rows and columns of the parts of a picture whose patches are averaged."""
BLACK = uri_of(png_of(np.zeros((2, 2, 3), np.uint8)))
"""A picture without anything on it."""
KEPT_VALUES = 2**26
"""Values of pictures that are kept as the model reads them; beyond, each is decoded anew."""


@dataclass(frozen=True)
class ImageReader:
    """What makes tensors of pictures for a model.

    Attributes:
        processor: transformers' image processor: size and normalisation.
        classes: name of each class -> its row of the head.
    """

    processor: Any
    classes: Mapping[str, int]
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def pixels(self, prompt: str) -> Tensor:
        """A picture as the model reads it: [channels, height, width] fp32."""
        found = self._kept.get(prompt)
        if found is None:
            found = self.processor(picture_of(prompt), return_tensors="pt")["pixel_values"][0].float()
            if (len(self._kept) + 1) * found.numel() <= KEPT_VALUES:
                self._kept[prompt] = found
        return found

    def stacked(self, prompts: Sequence[str]) -> Tensor:
        """[N, channels, height, width] fp32."""
        return torch.stack([self.pixels(prompt) for prompt in prompts])

    @property
    def names(self) -> list[str]:
        """The classes in the order of the head's rows."""
        return sorted(self.classes, key=lambda name: self.classes[name])


def load_reader(path: str | Path) -> ImageReader:
    """The image processor and the classes of a checkpoint folder or hub model.

    Raises:
        ValueError: no such model, or it has no image processor or no names of classes.
    """
    folder, what = resolve(path), f"model.path={str(path)!r}"
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    # Processor files are read by several libraries.
    except Exception as error:
        raise ValueError(
            f"{what}: no readable image processor ({cause(error)}); save one there, or set data.modality: text"
        ) from error
    config = read_config(folder, what)
    try:
        classes = {str(name): int(row) for name, row in (config.label2id or {}).items()}
        if not classes or sorted(classes.values()) != list(range(len(classes))):
            raise ValueError("a row of the head for each class, from 0 on")
    except MALFORMED as error:
        raise ValueError(
            f"{what}: label2id in its config names no classes ({cause(error)}); mend it"
        ) from None
    return ImageReader(processor, classes)


def encode(dataset: datasets.Dataset, reader: ImageReader, cfg: DataConfig) -> datasets.Dataset:
    """Pictures with the rows of their classes: ``image``, ``labels`` (one each) and ``num_answer_tokens`` (1)."""
    answers = dataset["answer"][:]
    columns = {
        "image": dataset["prompt"][:],
        "labels": [[reader.classes[answer]] for answer in answers],
        "num_answer_tokens": [1] * len(answers),
    }
    features = datasets.Features(
        image=datasets.Value("string"),
        labels=datasets.Sequence(datasets.Value("int32")),
        num_answer_tokens=datasets.Value("int32"),
    )
    return datasets.Dataset.from_dict(columns, features=features)


def batching(reader: ImageReader) -> dict[str, Any]:
    """Pictures of a micro-batch as one tensor; the loss of their classes."""
    return {"collate": partial(collate, reader), "nll_sum": nll_sum}


def collate(reader: ImageReader, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """``pixel_values`` [B, C, H, W] fp32 and ``labels`` [B] int64; one black picture without a label where there are no rows."""
    if not rows:
        # Of the size that the processor makes, which may crop behind resizing.
        return {
            "pixel_values": torch.zeros_like(reader.stacked([BLACK])),
            "labels": torch.tensor([IGNORE]),
        }
    return {
        "pixel_values": reader.stacked([row["image"] for row in rows]),
        "labels": torch.tensor([row["labels"][0] for row in rows]),
    }


def nll_sum(forward: Any, inputs: dict[str, Tensor], labels: Tensor, scale: float = 1.0) -> Tensor:
    """Sum of the negative log-likelihood of the labelled pictures times ``scale``: scalar fp32, in nats."""
    logits = forward(**inputs).logits.float()
    return F.cross_entropy(logits, sent(labels, logits.device), ignore_index=IGNORE, reduction="sum") * scale


def check_size(
    task: Task,
    reader: ImageReader | None,
    role: str,
    context: int | None,
    scored: bool,
    data: DataConfig,
    evaluation: EvalConfig,
) -> None:
    """Raise ValueError where the model reads no pictures, one cannot be read, or the head has no row for a class."""
    if not isinstance(reader, ImageReader | None):
        raise ValueError(f"{role}.tiny: makes a model of texts, but data.modality is image; use {role}.vit")
    for name, part in zip(("training", "test", "validation"), task.parts, strict=False):
        _check_pictures(part["prompt"][:], name)
    classes = {answer for part in task.parts for answer in part["answer"][:]}
    missing = set() if reader is None else classes - set(reader.classes)
    if missing:
        raise ValueError(
            f"the head of the {role} has no row for the class {min(missing)!r}; make the base with vit.classes that hold it, "
            "or give a model whose config.json names it in label2id"
        )


def _check_pictures(prompts: Sequence[str], part: str) -> None:
    """The first is decoded, the others are verified."""
    for i, prompt in enumerate(prompts):
        try:
            (check_picture if i else picture_of)(prompt)
        except ValueError as error:
            raise ValueError(f"{part} example {i}: {error}") from error


def represent(
    model: Any,
    prompts: Sequence[str],
    reader: ImageReader,
    data: DataConfig,
    *,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    batch_size: int,
) -> dict[Pooling, Tensor]:
    """By pooling, of which there is one, [N, L, D] fp32 of hidden layers of the model; see the file's head. Collective."""
    if not prompts:
        raise ValueError("prompts: there are none; give at least one picture")

    def run(batch: list[int]) -> list[Tensor]:
        device = next(model.parameters()).device
        pixels = reader.stacked([prompts[i] for i in batch]).to(device)
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        for layer in layers:
            if not -len(states) <= layer < len(states):
                raise ValueError(
                    f"bank.layer={layer}: must lie in [{-len(states)}, {len(states)}) for this model; use -1 for the last"
                )
        # clones: a row that is pickled for the other ranks would take the whole batch with it
        return [row.clone() for row in torch.stack([pooled(states[layer]) for layer in layers], dim=1).cpu()]

    with evaluating(model) as alone:
        x = torch.stack(map_over_ranks([1] * len(prompts), batch_size, run, alone))
    return dict.fromkeys(poolings, x)


def pooled(states: Tensor) -> Tensor:
    """[B, 5 hidden] fp32 of hidden states [B, 1 + patches, hidden]; [B, 2 hidden] where they make no square."""
    first, patches = states[:, 0].float(), states[:, 1:].float()
    side = math.isqrt(patches.shape[1])
    if side < QUARTERS or side * side != patches.shape[1]:
        return torch.cat([first, patches.mean(1)], dim=1)
    grid = patches.transpose(1, 2).unflatten(2, (side, side))
    return torch.cat([first, F.adaptive_avg_pool2d(grid, QUARTERS).flatten(1)], dim=1)


def always(module: nn.Module, task: Task, mask: MaskConfig) -> Mapping[str, Tensor]:
    """The rows of the head that are the task's classes ([Note: heads of tasks])."""
    config: Any = module.config
    classes = {str(name): int(row) for name, row in config.label2id.items()}
    width = full_shape(getattr(module, HEAD).weight)[1]
    rows = torch.tensor(sorted(classes[answer] for answer in task.answers))
    return {f"{HEAD}.weight": (rows[:, None] * width + torch.arange(width)).flatten()}


def lora(module: nn.Module) -> dict[str, Any]:
    """Every linear layer of the body; the head is trained whole."""
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear) and name != HEAD]
    return {"target_modules": linear, "modules_to_save": [HEAD]}
