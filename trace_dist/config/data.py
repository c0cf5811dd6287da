"""Tokenisation, and how examples lie in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.parts import MODALITIES


@dataclass(frozen=True)
class DataConfig(Section):
    """Tokenisation, and how examples lie in a batch."""

    section: ClassVar[str] = "data"

    modality: str = "text"
    """What a prompt is: text, image (a picture, answered with its class by an image classifier), or the path of a module of your
    own."""
    max_length: int = 512
    """Longest example in tokens, prompt and answer together; a longer prompt is an error, never cut silently."""
    truncate_prompt: bool = False
    """Cut a too long prompt on the left (the answer is never cut); how many were cut is logged."""
    num_proc: int = 1
    """Processes that tokenise."""
    packing: bool = False
    """Let short training examples share a row, so that less is padding; none sees another. Off, with a word, for a model that
    cannot keep them apart, which is measured before the first step. `train.micro_batch_size` then counts rows."""

    def check(self) -> None:
        self.at_least(2, "max_length")
        self.at_least(1, "num_proc")
        MODALITIES.check(self.modality)
        rule = "only texts can share a row"
        check(self.modality == "text" or not self.packing, "data.packing", self.packing, rule, "leave it out")
