"""An ordinary Hugging Face checkpoint: the base model with the delta in its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trace_dist.bank.composition import compose
from trace_dist.bank.delta import Delta, applied
from trace_dist.config.checks import Section
from trace_dist.models.loading import load_tokenizer
from trace_dist.parts import COMPOSITIONS
from trace_dist.sharding.build import load_sharded
from trace_dist.utils.files import filled_folder

label = "Hugging Face checkpoint"


@dataclass(frozen=True)
class Options(Section):
    """Of ``hf``."""

    section: ClassVar[str] = "exporter.options"

    composition: str = "sum"
    """How several deltas become one: sum, average, ties, dare, or the path of a module of your own."""

    def check(self) -> None:
        COMPOSITIONS.check(self.composition)


def write(deltas: Sequence[Delta], out: Path, base: str, dtype: str, options: Options) -> None:
    """Write the base with one delta, or with what several of them make together; without any, the base itself.

    Raises:
        ValueError: it cannot be written; what lay in ``out`` is then still there.
    """
    model = load_sharded(base, dtype)
    delta = deltas[0] if len(deltas) == 1 else None
    if len(deltas) > 1:
        delta = compose(deltas, model, "+".join(each.task for each in deltas), options.composition)
    with filled_folder(out) as folder:
        with applied(model, delta):
            model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
