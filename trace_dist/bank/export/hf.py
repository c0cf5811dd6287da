"""An ordinary Hugging Face checkpoint: the base model with the delta in its weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import applied
from trace_dist.models.loading import load_tokenizer
from trace_dist.sharding.build import load_sharded

label = "Hugging Face checkpoint"


def write(bank: DeltaBank, tasks: Sequence[str], out: Path, base: str, dtype: str) -> None:
    """Write the base with one task's delta, or with the sum of several tasks' changes."""
    deltas = [delta for task in tasks if (delta := bank.delta(task)) is not None]
    model = load_sharded(base, dtype)
    delta = deltas[0] if len(deltas) == 1 else compose(deltas, model, "+".join(tasks)) if deltas else None
    with applied(model, delta):
        model.save_pretrained(out)
    load_tokenizer(base).save_pretrained(out)
