"""Every path of a run and of a bank, in one place: docs/formats.md as code.

Nothing here touches the disk; a path says where something lies, not that it is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        root: the run's folder (``run_dir`` of its configuration).
    """

    root: Path

    @classmethod
    def of(cls, run_dir: str | Path) -> RunFolder:
        """The folder that a configuration names."""
        return cls(Path(run_dir))

    @property
    def config(self) -> Path:
        """The run's configuration."""
        return self.root / "config.yaml"

    @property
    def mark(self) -> Path:
        """The ``run_dir`` of the configuration that a run has kept here; ``config.yaml`` alone may be a file of the user's."""
        return self.root / ".trace-dist-run"

    @property
    def lock(self) -> Path:
        """Held by the command that writes into the folder."""
        return self.root / ".lock"

    @property
    def logs(self) -> Path:
        """What the stages, their launchers and libraries print: a file per stage."""
        return self.root / "logs"

    def log(self, stage: str) -> Path:
        """What one stage has printed, the newest start last."""
        return self.logs / f"{stage.replace(' ', '-')}.log"

    @property
    def stages(self) -> Path:
        """Wall time of the stages."""
        return self.root / "stages.json"

    @property
    def tasks(self) -> Path:
        """The tasks' trivial baselines: majority answer, overlap of training and test prompts."""
        return self.root / "tasks.json"

    @property
    def density(self) -> Path:
        """Which densities have raced, and how they did."""
        return self.root / "density.json"

    @property
    def memory(self) -> Path:
        """Measured model states."""
        return self.root / "memory.json"

    @property
    def metrics(self) -> Path:
        """Scalars of all training, one JSON record a line."""
        return self.root / "metrics.jsonl"

    def tensorboard(self, tag: str) -> Path:
        """TensorBoard files of one training run."""
        return self.root / "tensorboard" / tag

    @property
    def results(self) -> Path:
        """Everything that was measured."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """The page drawn from the results."""
        return self.root / "report.html"

    @property
    def scores(self) -> Path:
        """What ``evaluate`` found."""
        return self.root / "eval.json"

    @property
    def specificity(self) -> Path:
        """Cosines between the tasks' updates."""
        return self.root / "probe" / "specificity.json"

    def trace(self, task: str) -> Path:
        """What the warm start of a task left: the scores of its units, and its losses."""
        return self.root / "probe" / "traces" / f"{task}.safetensors"

    def sketch(self, task: str) -> Path:
        """A sketch of the warm start's update, with which other tasks are compared."""
        return self.root / "probe" / "sketches" / f"{task}.safetensors"

    def saliency(self, task: str) -> Path:
        """The proxy's saliency map of a task."""
        return self.root / "probe" / f"{task}.safetensors"

    def proxy_mask(self, task: str) -> Path:
        """The proxy's mask of a task."""
        return self.root / "probe" / "masks" / f"{task}.safetensors"

    def mask(self, task: str, kind: str = "projected") -> Path:
        """A task's mask of the target; ``kind`` is projected or random."""
        folder = self.root / "masks"
        return (folder if kind == "projected" else folder / kind) / f"{task}.safetensors"

    def delta(self, task: str) -> Path:
        """The delta that training one task by itself leaves."""
        return self.root / "deltas" / f"{task}.safetensors"

    def bank(self, method: str = "retrieved") -> BankFolder:
        """The bank that a method fills; the run's own is ``bank``."""
        return BankFolder(self.root / ("bank" if method == "retrieved" else f"bank_{method}"))

    def checkpoints(self, method: str, task: str = "") -> Path:
        """Checkpoints of one task's training by a method; the folder of all its tasks without one."""
        return self.root / "checkpoints" / method / task

    @property
    def methods(self) -> Path:
        """Results of the methods, a file each."""
        return self.root / "methods"

    def method(self, name: str) -> Path:
        """A method's result."""
        return self.methods / f"{name}.json"

    def product(self, name: str) -> Path:
        """The one set of weights that a method has made of all tasks, as a delta against the base."""
        return self.root / f"{name}.safetensors"

    def progress(self, name: str) -> Path:
        """What a method has finished so far, until its result is written: scores and state after each task."""
        return self.root / "progress" / name

    def race(self, name: str) -> Path:
        """Which learning rates a method raced, and how they did."""
        return self.progress(name) / "race.json"


DELTA, SIGNATURE, SKETCH, ADAPTED, PROMPTS = (
    f"{kind}.safetensors" for kind in ("delta", "signature", "sketch", "adapted", "prompts")
)
RECIPE = "recipe.json"
"""Files of one task in a bank."""


@dataclass(frozen=True)
class BankFolder:
    """The files of a bank.

    Attributes:
        root: the bank's folder.
    """

    root: Path

    @property
    def index(self) -> Path:
        """What the bank holds: replaced whole at every change."""
        return self.root / "bank.json"

    @property
    def newest(self) -> Path:
        """The newest generation that the index has had."""
        return self.root / ".generation"

    @property
    def lock(self) -> Path:
        """Held by the one process that writes."""
        return self.root / ".lock"

    @property
    def command_lock(self) -> Path:
        """Held by the command that fills the bank, from its beginning to its end, and by whoever else changes it."""
        return self.root / ".command.lock"

    @property
    def tasks(self) -> Path:
        """A folder for each task."""
        return self.root / "tasks"

    def task(self, folder: str) -> Path:
        """One task's files. ``folder`` is the name that the index gives it, never a path."""
        return self.tasks / folder

    @property
    def old_signatures(self) -> Path:
        """All signatures of a bank of version 1."""
        return self.root / "signatures.safetensors"

    @property
    def old_deltas(self) -> Path:
        """The deltas of a bank of version 1."""
        return self.root / "deltas"

    def old_delta(self, task: str) -> Path:
        """A delta of a bank of version 1."""
        return self.old_deltas / f"{task}.safetensors"
