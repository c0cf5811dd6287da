"""Deltas and retrieval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from trace_dist.config.checks import AUTO, Section, check
from trace_dist.parts import SIGNATURES, STARTS

Pooling = Literal["mean", "last", "max", "mean_std"]
"""How the tokens of a prompt become one representation."""
View = tuple[int, Pooling]
"""A hidden layer and a pooling."""


@dataclass(frozen=True)
class BankConfig(Section):
    """Deltas and retrieval (PROTEUS, arXiv 2603.13235)."""

    section: ClassVar[str] = "bank"

    path: str | None = None
    """Folder of the bank that tasks are learned into (`--bank DIR` for short); `<run_dir>/bank` when not set."""
    signature: str = "kmeans"
    """How a task's prompts are described: kmeans (clusters, one covariance for all tasks), diagonal or full (a mixture of
    Gaussians of its own), dirichlet (the same, Dirichlet process), mean (one mean), or the path of a module of your own."""
    clusters: int = 4
    """Largest number of clusters per task; the number used is chosen by held-out likelihood (by dirichlet itself)."""
    num_prompts: int = 400
    """Different training prompts per task from which a signature is made."""
    layer: int | Literal["auto"] = -1
    """Hidden layer whose states at the prompt's tokens represent it (-1 is the last), or `auto`: chosen by held-out retrieval
    among the tasks and general sets of the run that begins the bank; the bank keeps it for good."""
    pooling: Pooling | Literal["auto"] = "mean"
    """How the tokens' states become one representation: mean, last (the last token's), max (of each dimension), mean_std (mean
    and standard deviation of each, twice as wide), or `auto`: chosen as the layer is. Images have mean alone."""

    representation: Literal["base", "adapted"] = "base"
    """`base`: a prompt is represented by the frozen base. `adapted`: the base proposes `candidates` tasks, and the prompt then
    goes through each one's own weights; the most likely one wins. Tasks must have been learned with it."""
    candidates: int = 3
    """Tasks whose weights a prompt is tried with, for representation adapted."""
    reject: float | None = None
    """Share of a task's own prompts that may be taken for none of the bank's and go to the base, in (0, 1); then prompts that
    are less typical of the task they retrieve go to the base. Nothing is rejected when not set."""

    keep_prompts: int = 1000
    """Training prompts per task that the bank keeps, without their answers, so that it can be folded into one set of weights
    later (`consolidate`); 0 keeps none. Of general sets of running text the text itself is kept."""

    composition: str = "none"
    """Where a new task's training begins: none (at the base), combination (at the earlier deltas, each times fitted scalars,
    where a short training from there ends lower than one from the base; its own mask gives up their entries), or the path of a
    module of your own."""
    composition_options: dict[str, Any] = field(default_factory=dict)
    """Options of the composition; of combination: candidates (3), steps (20), trial_steps (20), batch_size (train.batch_size),
    lr (0.1), l1 (0.1), l2 (0.01), least_gain (0.05)."""
    keep: Literal["whole", "recipe"] = "whole"
    """What the bank keeps of a task that begins with earlier deltas: `whole`, all of its values, which need no other task; or
    `recipe`, its own part and some hundred bytes that say which deltas it began with. Those can be renamed, but not removed."""

    @property
    def view(self) -> View:
        """Layer and pooling. Raises ValueError where one is `auto`."""
        for name in ("layer", "pooling"):
            value = getattr(self, name)
            check(value != AUTO, f"bank.{name}", value, "there is no bank that it is chosen for", "name one")
        return int(self.layer), cast(Pooling, self.pooling)

    def check(self) -> None:
        self.expand("path")
        self.at_least(1, "clusters", "num_prompts", "candidates")
        self.at_least(0, "keep_prompts")
        SIGNATURES.check(self.signature)
        STARTS.check(self.composition)
        composed, cure = self.composition != "none", "set bank.composition: combination, or leave it out"
        check(composed or self.keep == "whole", "bank.keep", self.keep, "every task begins at the base", cure)
        inside = self.reject is None or 0 < self.reject < 1
        check(inside, "bank.reject", self.reject, "must lie in (0, 1)", "use for example 0.05")
