"""What a study compares, and in which order; the section ``study`` beside a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from trace_dist.config.checks import Section, check
from trace_dist.config.probe import ProbeConfig
from trace_dist.config.task import TaskConfig
from trace_dist.parts import ARMS


@dataclass(frozen=True)
class StageConfig(Section):
    """Some arms at some densities on all tasks. Stages are worked off in order, so that a study that is cut says something."""

    section: ClassVar[str] = "study.stages"

    arms: list[str]
    """Ways of training that are compared (studies/arms)."""
    densities: list[float]
    """Shares of the maskable elements; an arm without a density of its own, such as full, is trained once."""
    seeds: int = 1
    """Seeds of masks and order of the data."""
    undecided: bool = False
    """After the first, only seeds of what the interval of the paired difference does not decide."""

    def check(self) -> None:
        check(len(self.arms) >= 1, "study.stages.arms", self.arms, "must name at least one arm", "add one")
        for name in self.arms:
            ARMS.check(name)
        inside = bool(self.densities) and all(0 < density <= 1 for density in self.densities)
        rule, cure = "must hold numbers in (0, 1]", "use for example [1e-4, 1e-3]"
        check(inside, "study.stages.densities", self.densities, rule, cure)
        self.at_least(1, "seeds")


@dataclass(frozen=True)
class StudyConfig(Section):
    """What a study compares."""

    section: ClassVar[str] = "study"

    stages: list[StageConfig]
    """What is compared, in this order."""
    local_tasks: list[TaskConfig] = field(default_factory=list)
    """Tasks of data that nothing installs; those whose path is not there are left out."""
    reference: str = "random"
    """The arm that the others are compared with."""
    rule: float = 7.0
    """First rate of a masked arm: this over the sum of the absolute mean gradients at its entries. Fitted anew on the study's
    first two tasks; see the note in studies/rates.py."""
    first_rates: dict[str, float] = field(default_factory=lambda: {"full": 1e-4, "lora": 1e-3})
    """First rates of arms that have no mask."""
    max_rates: int = 7
    """Rates that an arm may try on a task at a density."""
    validation: int = 64
    """Training examples that are held out to choose rates by."""
    proxy_probe: ProbeConfig | None = None
    """How the proxy is probed, where not as the target (section `probe`). A proxy that does not learn the task shows nothing."""
    plain: bool = False
    """Leave out the chat template: prompts are shorter, and trainings quicker."""
    text: str | None = None
    """Text file for the loss on general text, or `package:<module>/<file>` for one that a package ships. The test answers of the
    general sets when not set."""
    text_tokens: int = 64
    """Tokens of a passage of that file."""
    num_texts: int = 48
    """Passages, or test examples of each general set."""
    out: str | None = None
    """JSON file of what the study says; `<run_dir>/study.json` when not set."""
    records: str | None = None
    """File with a line for every training, from which a cut study goes on; `<run_dir>/records.jsonl` when not set. One that is
    kept beside the result lets others go on, without the run folder: masks that are missing are made again."""

    def check(self) -> None:
        check(len(self.stages) >= 1, "study.stages", self.stages, "must hold at least one stage", "add one")
        self.at_least(1, "validation", "text_tokens", "num_texts")
        self.at_least(3, "max_rates")
        self.positive("rule")
        ARMS.check(self.reference)
        rates = self.first_rates
        good = all(rate > 0 for rate in rates.values())
        check(good, "study.first_rates", rates, "must be positive", "use for example {full: 1e-4}")

    @property
    def arms(self) -> list[str]:
        """All arms, in the order in which they come."""
        return list(dict.fromkeys(arm for stage in self.stages for arm in stage.arms))

    @property
    def densities(self) -> list[float]:
        """All densities, rising."""
        return sorted({density for stage in self.stages for density in stage.densities})
