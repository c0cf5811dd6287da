"""Loss and accuracy of held-out examples, one by one, in one forward pass; and passages of general text."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from trace_dist.data.batches import collate
from trace_dist.data.encoding import IGNORE, tokenize
from trace_dist.data.files import read_text
from trace_dist.train.loss import answer_logits
from trace_dist.utils import dist
from trace_dist.utils.devices import sent
from trace_dist.utils.home import from_home

Rows = Sequence[Mapping[str, Any]]
"""Encoded examples: ``input_ids`` and ``labels``."""
PACKAGE = "package:"


@dataclass(frozen=True)
class HeldOut:
    """What a model says to held-out examples.

    Attributes:
        nats: of each example's answer tokens together.
        right: whether each answer token of an example is the likeliest one. Greedy decoding gives the answer exactly then.
        tokens: answer tokens of each example.
    """

    nats: list[float]
    right: list[bool]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """Nats per answer token over all examples."""
        return sum(self.nats) / sum(self.tokens)


class Asked(Protocol):
    """What answers: a learner, or a model as it is."""

    @property
    def module(self) -> nn.Module: ...
    @property
    def forward(self) -> Callable[..., Any]: ...


class AsIs(NamedTuple):
    """A model as it is."""

    module: nn.Module
    forward: Callable[..., Any]


@torch.no_grad()
def held_out(forward: Callable[..., Any], rows: Rows, pad_id: int, batch_size: int) -> HeldOut:
    """Score examples; those of similar length together, so that little is padded.

    Args:
        forward: the model, in evaluation mode and on this rank's device, or a function that passes its arguments on.
        rows: the examples.
        pad_id: id for padded positions.
        batch_size: examples per forward pass.
    """
    device = dist.local_device()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    nats, right, tokens = [0.0] * len(rows), [False] * len(rows), [0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = collate([rows[index] for index in batch], pad_id)
        labels = inputs.pop("labels")
        inputs = {name: sent(each, device) for name, each in inputs.items()}
        logits, targets = answer_logits(forward, inputs, labels)
        each = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
        hits = (logits.argmax(-1) == targets) | (targets == IGNORE)
        columns = [found.view(len(batch), -1).cpu() for found in (each, hits, targets != IGNORE)]
        for place, index in enumerate(batch):
            nats[index] = float(columns[0][place].double().sum())
            right[index] = bool(columns[1][place].all())
            tokens[index] = int(columns[2][place].sum())
    return HeldOut(nats, right, tokens)


def passages(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int
) -> list[dict[str, list[int]]]:
    """Evenly spaced passages of a text as rows; each token but the first of a passage is predicted.

    Raises:
        ValueError: the text is shorter than one passage.
    """
    (ids,) = tokenize([text], tokenizer)
    whole = len(ids) // length
    if whole < 1:
        raise ValueError(
            f"study.text: it has {len(ids)} tokens, fewer than study.text_tokens={length}; lower that"
        )
    rows = []
    for number in range(min(most, whole)):
        start = (number * whole // min(most, whole)) * length
        cut = ids[start : start + length]
        rows.append({"input_ids": cut, "labels": [IGNORE, *cut[1:]]})
    return rows


def find_text(source: str) -> str:
    """A text file, or one that a package ships (``package:<module>/<file>``).

    Raises:
        ValueError: it is not there.
    """
    path = from_home(source)
    if source.startswith(PACKAGE):
        module, _, file = source.removeprefix(PACKAGE).partition("/")
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"study.text={source!r}: no such package is installed; install it or give a file"
            )
        path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise ValueError(f"study.text={source!r}: no such file; fix the path")
    return read_text(path)
