"""The methods that learn the tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.parts import METHODS

USUAL = ("retrieved", "consolidated", "random", "full", "lora")
"""Methods of a run that names none."""


@dataclass(frozen=True)
class ContinualConfig(Section):
    """The methods that learn the tasks one after the other."""

    section: ClassVar[str] = "continual"

    methods: list[str] = field(default_factory=lambda: list(USUAL))
    """retrieved (a delta per task), consolidated (one set of weights that those deltas teach), merged (one set of weights, masks
    task after task with replay), random (retrieved with random masks), and for comparison trace (retrieved with whole tensors, by
    TRACE's own recipe), full (full fine-tuning, task after task), lora (PEFT LoRA, task after task); merges of the deltas
    without training: sum, average, ties, dare; published methods: lora_retrieved, ewc, ella, ps, osft, olora, slao,
    shira_random; without any training: nearest_mean, random_features; bounds: joint (all tasks at once), separate (a model per
    task, which is given); or the path of a module of your own."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by method, as `{merged: {replay: 0.1, replay_memory: 0.01}, full: {lr: 1e-3}, lora: {lr: 3e-3, rank: 8}}`; the
    methods' files explain them, and those of a method that is not run are not used."""

    def check(self) -> None:
        check(
            len(self.methods) >= 1, "continual.methods", self.methods, "must name at least one method", "add one"
        )  # fmt: skip
        twice = sorted({name for name in self.methods if self.methods.count(name) > 1})
        check(not twice, "continual.methods", twice, "a method is named twice", "name it once")
        for name in (*self.methods, *self.options):
            METHODS.check(name)
