"""What is made of measured steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from trace_dist.profiling import profile
from trace_dist.profiling.measure import Timeline
from trace_dist.profiling.memory_setup import MemorySetup

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_steps_that_are_too_small_to_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model fits into what the process held before."""
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    seen = profile.Measured({"weights": 1}, {}, Timeline(peak=0))
    monkeypatch.setattr(profile, "_train", lambda *_: (seen, []))
    with pytest.raises(
        ValueError, match=r"^model='.*': its steps took no more memory than was there before, "
    ):
        profile.run_profile(MemorySetup(str(tmp_path), backend="single", sequence_length=16))
