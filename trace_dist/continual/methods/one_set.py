"""What methods that make one set of weights out of the bank of ``retrieved`` have in common.

The state between tasks is a delta against the base, which the shared model holds between calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta, applied
from trace_dist.bank.index import Record
from trace_dist.bank.learned_on import warn_of_others
from trace_dist.config import RunConfig
from trace_dist.continual.judge import Row
from trace_dist.continual.methods.base import Method
from trace_dist.continual.setting import Setting
from trace_dist.models.fingerprint import check_same
from trace_dist.utils.together import on_main


class OneSet(Method):
    """One set of weights, made of what a bank holds."""

    masked = True
    on_ranks = True

    def __init__(self, name: str, setting: Setting, options: Any) -> None:
        super().__init__(name, setting, options)
        self.delta: Delta | None = None  # what is known; not None iff a task was learned

    @classmethod
    def check(cls, name: str, cfg: RunConfig) -> None:
        methods, alone = cfg.continual.methods, cfg.launch.single_process
        before = methods[: methods.index(name)] if name in methods else []
        if "retrieved" in before and "retrieved" not in alone:
            return
        missing = _missing(cfg)
        if missing and "retrieved" in before:
            raise ValueError(
                f"launch.single_process={alone}: retrieved would run after {name}, or beside it, which is made of its bank; take "
                "retrieved out"
            )
        if missing:
            raise ValueError(
                f"continual.methods={methods}: {name} is made of the bank that `retrieved` fills, which does not hold "
                f"{', '.join(missing)}; name retrieved before it"
            )

    @cached_property
    def bank(self) -> DeltaBank:
        """The bank of ``retrieved``. Collective when first used.

        Raises:
            ValueError: it is of another base model.
        """
        bank = DeltaBank(self.setting.cfg.bank_of().root)
        check_same(bank.base, self.setting.fingerprint, f"bank {bank.folder}")
        warn_of_others(bank, self.setting.model.quantize)
        return bank

    def made_of(self) -> dict[str, Any]:
        return self.deltas(stream.task.name for stream in self.setting.bench.tasks)

    def deltas(self, names: Iterable[str]) -> dict[str, Any]:
        """Checksums of the deltas of some tasks, for ``made_of``."""
        records = map(self.bank.index.get, names)
        return {
            "bank": {
                record.name: "+".join(filter(None, record.key))
                for record in records
                if record and record.files
            }
        }

    def score(self) -> Row:
        if self.delta is None:
            return self.setting.base_row
        with applied(self.setting.model, self.delta):
            return self.setting.judge.score(self.setting.model.module)

    def facts(self) -> dict[str, Any]:
        mask = self._known.mask
        return {"density": mask.density, "trainable": mask.num_entries}

    def product(self) -> Delta:
        return self._known

    def state(self, folder: Path) -> None:
        on_main(lambda: self._known.save(folder / "delta.safetensors"))

    def load_state(self, folder: Path) -> None:
        self.delta = Delta.load(folder / "delta.safetensors")

    @property
    def _known(self) -> Delta:
        if self.delta is None:
            raise AssertionError(f"{self.name}: nothing is known before the first task")
        return self.delta


def held(cfg: RunConfig) -> list[Record]:
    """What a run's bank holds so far. Collective."""
    folder = cfg.bank_of()
    return list(DeltaBank(folder.root).index.records) if on_main(folder.index.is_file) else []


def _missing(cfg: RunConfig) -> list[str]:
    """Tasks of a run that its bank does not hold yet."""
    names = [record.name for record in held(cfg)]
    return [task.name for task in cfg.tasks if task.name not in names]
