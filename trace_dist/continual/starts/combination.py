"""``combination``: a task begins with a selected combination of earlier deltas (PROTEUS, arXiv 2603.13235).

The earlier tasks whose prompts are most like the new one's are tried. A scalar for each of them and each group of weights is
fitted on a part of the task's training examples (train/combination.py), and counts where it lowers the answer loss on
the examples held out; otherwise the task begins at the base, and nothing is lost. The task's own mask gives up the entries that
the combination changes, so its own update is orthogonal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.delta import Delta, extract_delta
from trace_dist.bank.recipe import GROUPS, Part, Recipe
from trace_dist.bank.signature import Signature
from trace_dist.config.checks import Section
from trace_dist.continual.race import split
from trace_dist.continual.setting import Setting
from trace_dist.continual.starts.base import Begun, Start
from trace_dist.masks.mask import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.combination import CombinationLearner
from trace_dist.train.task import train_learner
from trace_dist.train.validation import answer_loss
from trace_dist.train.workbench import Stream
from trace_dist.utils.log import get_logger
from trace_dist.utils.rng import random_numbers_kept
from trace_dist.utils.together import on_main

logger = get_logger(__name__)


@dataclass(frozen=True)
class Options(Section):
    """Of ``combination``."""

    section: ClassVar[str] = "bank.composition_options"

    candidates: int = 3
    """Earlier tasks that are tried: those whose prompts are most like the new task's."""
    steps: int = 20
    """Steps of the fit, on batches of `train.batch_size`."""
    lr: float = 0.1
    """Peak step of a scalar; 1 is the whole of an earlier delta."""
    l1: float = 0.1
    """What a scalar loses after each step, as a share of the step's peak length; scalars that win less stay at 0."""
    l2: float = 0.01
    """What a scalar loses after each step, as a share of itself for a step of length 1."""
    least_gain: float = 0.02
    """Share of the held-out answer loss that the combination must win, or the task begins at the base."""

    def check(self) -> None:
        self.at_least(1, "candidates", "steps")
        self.positive("lr")
        self.at_least(0, "l1", "l2", "least_gain")


class Combination(Start):
    """Earlier deltas, each times a few scalars."""

    label = "from a combination of earlier tasks"

    def begin(
        self, setting: Setting, bank: DeltaBank, stream: Stream, mask: Mask, signature: Signature, name: str
    ) -> Begun:
        deltas = self._candidates(setting.model, bank, stream.task.name, mask, signature)
        if not deltas:
            return Begun()
        with random_numbers_kept():
            setting.seed(stream.task.name)
            return self._fitted(setting, bank, stream, deltas, name)

    def _candidates(
        self, model: ShardedModel, bank: DeltaBank, task: str, mask: Mask, signature: Signature
    ) -> list[Delta]:
        """Deltas of the tasks whose prompts are most like the new one's, with the units of its mask. Collective."""
        names = [other for other in bank.tasks if other not in (BASE, task)]
        if not names:
            return []
        places = [bank.tasks.index(name) for name in names]
        alike = on_main(lambda: bank.retriever.scores(signature.heldout).mean(dim=0)[places])
        order = alike.argsort(descending=True, stable=True)[: self.options.candidates].tolist()
        found = [bank.delta_on(names[index], model) for index in order]
        deltas = [delta for delta in found if delta is not None]
        alike_units = [delta for delta in deltas if _same_units(delta.mask, mask)]
        if len(alike_units) < len(deltas):
            logger.warning(
                "%s: %d earlier tasks have masks of other units and are left out",
                task,
                len(deltas) - len(alike_units),
            )
        return alike_units

    def _fitted(
        self, setting: Setting, bank: DeltaBank, stream: Stream, deltas: Sequence[Delta], name: str
    ) -> Begun:
        options, cfg = self.options, setting.cfg
        part, heldout = split(stream, cfg.race, cfg.seed)
        step = next(setting.bench.batches([heldout], len(heldout.encoded)))
        learner = CombinationLearner(setting.model, deltas, options.lr, options.l1, options.l2)
        try:
            before = answer_loss(learner, step)
            # Peak and schedule are the fit's own; nothing is kept of a few steps.
            train = replace(cfg.train.strict(), lr=options.lr, checkpoint_every=0, warmup_steps=0)
            train_learner(
                learner,
                setting.bench.batches([part], cfg.train.batch_size),
                train,
                options.steps,
                description=f"{name}/{stream.task.name}: combination",
                rate="bank.composition_options.lr",
            )
            after = answer_loss(learner, step)
            scalars = learner.scalars.detach().cpu()
            used = [row for row in range(len(deltas)) if bool(scalars[row].any())]
            facts = _facts(deltas, scalars, before, after)
            if not used or not after <= (1 - options.least_gain) * before:
                logger.info(
                    "%s: earlier tasks do not help (loss %.4f, base %.4f)", stream.task.name, after, before
                )
                return Begun(facts={**facts, "used": False})
            setting.model.detach()
            changed = reduce(or_, (deltas[row].mask for row in used))
            begun = extract_delta(
                setting.model, changed.with_meta(model=setting.fingerprint), stream.task.name
            )
        finally:
            learner.restore()
        shown = ", ".join(f"{deltas[row].task} {_shown(scalars[row])}" for row in used)
        logger.info("%s: begins with %s (loss %.4f, base %.4f)", stream.task.name, shown, after, before)
        recipe = _recipe(bank, [deltas[row] for row in used], scalars[used])
        return Begun(begun, {**facts, "used": True}, recipe)


def _recipe(bank: DeltaBank, deltas: Sequence[Delta], scalars: Tensor) -> Recipe | None:
    """The combination by the checksums of what it is made of; None in a bank of version 1, whose index has none."""
    parts = []
    for delta, row in zip(deltas, scalars, strict=True):
        record = bank.index.get(delta.task)
        found, recipe = record.key if record is not None else (None, None)
        if found is None:
            return None
        parts.append(Part(found, dict(zip(GROUPS, row.tolist(), strict=True)), recipe))
    return Recipe(tuple(parts))


def _same_units(mask: Mask, other: Mask) -> bool:
    return mask.granularity == other.granularity and dict(mask.layouts) == dict(other.layouts)


def _facts(deltas: Sequence[Delta], scalars: Tensor, before: float, after: float) -> dict[str, Any]:
    rows = {
        delta.task: dict(zip(GROUPS, row.tolist(), strict=True))
        for delta, row in zip(deltas, scalars, strict=True)
    }
    return {"scalars": rows, "base_loss": before, "loss": after}


def _shown(row: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in row.tolist())


START = Combination
