"""One task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trace_dist.config.checks import Section, check
from trace_dist.utils.names import check_task_name


@dataclass(frozen=True)
class TaskConfig(Section):
    """One task: prompt/answer pairs from exactly one source (path or reasoning_gym)."""

    name: str
    """Name used in files and tables."""
    path: str | None = None
    """A .jsonl file, a folder with train/eval/test.json (TRACE layout), or a datasets.save_to_disk folder."""
    reasoning_gym: dict[str, Any] | None = None
    """`{dataset: spell_backward, min_word_len: 5, ...}`: a procedural reasoning-gym dataset and its options."""
    prompt_field: str = "prompt"
    """Column with the prompt."""
    answer_field: str = "answer"
    """Column with the answer."""
    num_train: int = 4000
    """Training examples used (fewer if the source has fewer)."""
    num_test: int = 200
    """Test examples used (fewer if the source has fewer)."""
    metric: Literal["exact_match", "choice", "bits_per_byte"] = "exact_match"
    """Greedy exact match, label log-likelihood over the set of answers, or bits per byte of the answer text."""
    steps: int | None = None
    """Optimizer steps for this task; the train section's value when not set."""

    @property
    def where(self) -> str:
        return f"tasks.{self.name}"

    def check(self) -> None:
        sources = {"path": self.path, "reasoning_gym": self.reasoning_gym}
        rule = "exactly one of path and reasoning_gym must be set"
        check(list(sources.values()).count(None) == 1, self.where, sources, rule, "give the task one source")
        check_task_name(self.name)
        if self.reasoning_gym is not None:
            options, cure = self.reasoning_gym, "name the reasoning-gym dataset"
            name = f"{self.where}.reasoning_gym"
            check("dataset" in options, name, options, "needs the key 'dataset'", cure)
        self.at_least(1, "num_train", "num_test", "steps")
