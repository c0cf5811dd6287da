"""Everything a run needs."""

from __future__ import annotations

import os.path
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from trace_dist.config.bank import BankConfig
from trace_dist.config.checks import AUTO, Section, check
from trace_dist.config.continual import ContinualConfig
from trace_dist.config.data import DataConfig
from trace_dist.config.evaluation import EvalConfig
from trace_dist.config.launch import LaunchConfig
from trace_dist.config.mask import MaskConfig
from trace_dist.config.model import ModelConfig
from trace_dist.config.probe import ProbeConfig
from trace_dist.config.projection import ProjectionConfig
from trace_dist.config.race import RaceConfig
from trace_dist.config.task import GeneralConfig, TaskConfig
from trace_dist.config.train import TrainConfig
from trace_dist.run_folder import BankFolder, RunFolder
from trace_dist.utils.names import check_distinct, check_new_name

Backend = Literal["single", "zero3", "fsdp2"]


@dataclass(frozen=True)
class RunConfig(Section):
    """Everything a run needs."""

    section: ClassVar[str] = ""

    target: ModelConfig
    """The large model that is trained."""
    tasks: list[TaskConfig]
    """The tasks, in the order in which they arrive."""
    run_dir: str = ""
    """Folder that receives config.yaml, metrics.jsonl, results.json, report.html and the files of every stage; with a bank of
    its own (`bank.path`) it may be left out, and is then `<bank.path>.work/<first task>`."""
    proxy: ModelConfig | None = None
    """The small model that is probed; the target itself is probed when not set."""
    general: list[GeneralConfig] = field(default_factory=list)
    """Held-out abilities of the base model, for the general delta; tiny bases are pretrained on them."""
    backend: Backend = "single"
    """single (one process), zero3 (DeepSpeed ZeRO-3) or fsdp2 (torch fully_shard)."""
    seed: int = 0
    """Seed of everything random; from 0 to 2**32 - 1."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokenisation, and how examples lie in a batch."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Probing the proxy."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Masks."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """Projecting masks onto the target."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Masked training."""
    race: RaceConfig = field(default_factory=RaceConfig)
    """How a learning rate of `auto` is chosen."""
    continual: ContinualConfig = field(default_factory=ContinualConfig)
    """The methods that learn the tasks."""
    bank: BankConfig = field(default_factory=BankConfig)
    """Deltas and retrieval."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How `run` starts distributed stages."""

    def check(self) -> None:
        self.expand("run_dir")
        rule, cure = "must be set where bank.path is not", "name a folder, for example runs/mine"
        check(bool(self.run_dir or self.bank.path), "run_dir", self.run_dir, rule, cure)
        rule = "must lie between 0 and 2**32 - 1, as scikit-learn wants it"
        check(0 <= self.seed < 2**32, "seed", self.seed, rule, "choose another one")
        check(len(self.tasks) >= 1, "tasks", self.tasks, "must hold at least one task", "add a task")
        for task in self.tasks:
            check_new_name(task.name)
        check_distinct(task.name for task in (*self.tasks, *self.general))
        ranks, one_process = self.launch.num_ranks, self.backend == "single"
        rule, cure = "backend single runs in one process", "set backend: zero3 or fsdp2"
        check(ranks == 1 or not one_process, "launch.num_ranks", ranks, rule, cure)
        self._check_sequence()
        unranked = [task.name for task in self.tasks if task.metric == "bits_per_byte"]
        rule = "bits_per_byte is for general sets, accuracies are in percent"
        check(not unranked, "tasks.metric", unranked, rule, "choose one of the others for tasks")
        for task in self.general:
            for key in ("validation_split", "validation_path"):
                value, rule = getattr(task, key), "general sets are not trained, so nothing validates on them"
                check(value is None, f"general.{task.name}.{key}", value, rule, "leave it out")
        self._check_models()
        self._check_density()
        if not self.run_dir:
            # The one value that is worked out from others; the object is not shared yet.
            object.__setattr__(self, "run_dir", f"{self.bank.path}.work/{self.tasks[0].name}")
        self._check_places()

    def _check_places(self) -> None:
        """What a run fills has a folder of its own; a proxy may be the target, if it is made as the target is."""
        filled = {"run_dir": self.run_dir, "bank.path": self.bank.path}
        made = self.proxy is not None and self.proxy.made and self.proxy.source != self.target.source
        filled["target.path"] = self.target.path if made or self.target.made else None
        filled["proxy.path"] = self.probed.path if made else None
        names: dict[str, str] = {}
        for name, path in filled.items():
            if path is not None:
                place = os.path.abspath(path)
                rule, cure = f"is the folder of {names.get(place)}, too", "give each a folder of its own"
                check(place not in names, name, path, rule, cure)
                names[place] = name

    def _check_sequence(self) -> None:
        size, ranks = self.train.sequence_parallel, self.launch.num_ranks
        if size == 1:
            return
        name, rule = "train.sequence_parallel", "backend single runs in one process"
        check(self.backend != "single", name, size, rule, "set backend: zero3 or fsdp2, or use 1")
        rule = f"shares rows of tokens, and data.modality is {self.data.modality}"
        check(self.data.modality == "text", name, size, rule, "use 1")
        rule, cure = f"must divide launch.num_ranks={ranks}", "change one of the two"
        check(ranks == 1 or ranks % size == 0, name, size, rule, cure)

    def _check_models(self) -> None:
        prune = self.target.prune
        check(prune is None, "target.prune", prune, "only a proxy can be pruned", "move it")
        rule = "probing trains every weight, which 4-bit weights cannot"
        if self.proxy is not None:
            codes = self.proxy.quantize
            check(codes == "none", "proxy.quantize", codes, rule, "leave it out")
        codes = self.target.quantize
        if codes != "none":
            installed = find_spec("bitsandbytes") is not None
            cure = "install it (pip install 'trace-dist[nf4]') or set none"
            check(installed, "target.quantize", codes, "needs bitsandbytes", cure)
            check(self.proxy is not None, "target.quantize", codes, rule, "name a proxy")

    def _check_density(self) -> None:
        if self.mask.density != AUTO:
            return
        rule = "density and rate must fit each other, and a density that is raced for has a rate that is"
        check(
            self.train.lr == AUTO, "train.lr", self.train.lr, rule, "set train.lr: auto, or give mask.density"
        )
        for density in self.race.densities:
            self.mask.at(density)

    def at_density(self, density: float) -> RunConfig:
        """The same run at one density."""
        return replace(self, mask=self.mask.at(density))

    @property
    def largest(self) -> RunConfig:
        """The run at the largest density that it may take: its own where that is a number."""
        return self.at_density(max(self.race.densities)) if self.mask.density == AUTO else self

    @property
    def probed(self) -> ModelConfig:
        """The model that is probed: the proxy, or the target where no proxy is named."""
        return self.proxy or self.target

    @property
    def folder(self) -> RunFolder:
        """The files of the run."""
        return RunFolder.of(self.run_dir)

    def bank_of(self, method: str = "retrieved") -> BankFolder:
        """The bank that a method fills: ``bank.path`` for the run's own, where it is set."""
        own = self.bank.path is not None and method == "retrieved"
        return BankFolder(Path(str(self.bank.path))) if own else self.folder.bank(method)
