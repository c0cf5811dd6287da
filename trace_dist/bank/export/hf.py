"""An ordinary Hugging Face checkpoint: the base model with the delta in its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_dist.bank.delta import Delta, applied
from trace_dist.bank.export.card import write_card
from trace_dist.bank.export.together import Composed, together
from trace_dist.models.loading import load_tokenizer
from trace_dist.sharding.build import load_sharded
from trace_dist.utils.files import filled_folder

label = "Hugging Face checkpoint"


@dataclass(frozen=True)
class Options(Composed):
    """Of ``hf``."""


def write(deltas: Sequence[Delta], out: Path, base: str, dtype: str, options: Options) -> None:
    """Write the base with one delta, or with what several of them make together; without any, the base itself.

    Raises:
        ValueError: it cannot be written; what lay in ``out`` is then still there.
    """
    model = load_sharded(base, dtype)
    delta = together(deltas, model, options)
    with filled_folder(out) as folder:
        with applied(model, delta):
            model.save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
        write_card(folder, "hf", deltas, base, dtype, options)
