"""The methods that learn the tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.parts import METHODS


@dataclass(frozen=True)
class ContinualConfig(Section):
    """The methods that learn the tasks one after the other."""

    section: ClassVar[str] = "continual"

    methods: list[str] = field(default_factory=lambda: ["retrieved", "merged", "random", "full", "lora"])
    """retrieved (a delta per task), merged (one set of weights), random (retrieved with random masks), the baselines full
    (sequential full fine-tuning) and lora (sequential PEFT LoRA), or the path of a module of your own."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options of each method, `{merged: {replay: 0.1, replay_memory: 0.01}, full: {lr: 1e-3}, lora: {lr: 3e-3, rank: 8}}`;
    those of a method that is not run are not used."""

    def check(self) -> None:
        check(
            len(self.methods) >= 1, "continual.methods", self.methods, "must name at least one method", "add one"
        )  # fmt: skip
        twice = sorted({name for name in self.methods if self.methods.count(name) > 1})
        check(not twice, "continual.methods", twice, "names must be unique", "leave the second one out")
        for name in (*self.methods, *self.options):
            METHODS.check(name)
