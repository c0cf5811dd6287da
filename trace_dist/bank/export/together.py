"""What exporters have in common: the option that makes one delta of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from trace_dist.bank.composition import compose
from trace_dist.bank.delta import Delta
from trace_dist.bank.facts import narrowest
from trace_dist.config.checks import Section
from trace_dist.models.architecture import empty_model, read_config
from trace_dist.models.kinds import torch_dtype
from trace_dist.models.weight_files import resolve
from trace_dist.parts import COMPOSITIONS
from trace_dist.sharding.base import ShardedModel


@dataclass(frozen=True)
class Composed(Section):
    """Options of an exporter that writes one delta."""

    section: ClassVar[str] = "format.options"

    composition: str = "sum"
    """How several deltas become one: sum, average, ties, dare, magnitude_max, or the path of a module of your own."""

    def check(self) -> None:
        COMPOSITIONS.check(self.composition)


def held_dtypes(deltas: Sequence[Delta]) -> list[str]:
    """Names of the dtypes in which the deltas' models were loaded; some families keep a few tensors in fp32 beside that."""
    return sorted({dtype for delta in deltas if (dtype := narrowest(delta.dtypes)) is not None})


def empty_base(base: str, dtype: str = "float32") -> Any:
    """A base as it is when it is loaded in ``dtype``, without values; some families keep a few tensors in fp32."""
    what = f"model.path={base!r}"
    return empty_model(read_config(resolve(base), what), torch_dtype(dtype), what)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of each weight and buffer."""
    return {name: value.dtype for name, value in model.state_dict().items()}


def together(deltas: Sequence[Delta], model: ShardedModel, options: Composed) -> Delta | None:
    """The one delta that is written; None where there is none, and the base itself is.

    Args:
        deltas: what was asked for.
        model: their base, holding its own values.
        options: how several become one.

    Raises:
        ValueError: they do not go together.
    """
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    return compose(deltas, model, "+".join(each.task for each in deltas), options.composition)
