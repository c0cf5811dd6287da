"""``combination``: a task begins with a selected combination of earlier deltas (PROTEUS, arXiv 2603.13235).

The earlier tasks whose prompts are most like the new one's are tried. A scalar for each of them and each group of weights is
fitted on a part of the task's training examples (train/combination.py). The task's own mask gives up the entries that the
combination changes, so its own update is orthogonal to it; where nothing of the mask would be left, the task begins at the base.

[Note: trial] A lower loss before the first step proves little: deltas of any tasks teach a base to answer in so many words, which
the task's own mask learns in a few steps. So a combination that lowers the answer loss on the examples held out stands a trial.
The own mask is trained for ``trial_steps`` from the combination, and from the base, in the same order of examples. Where it does
not end lower from the combination, the scalars are 0: the task begins at the base, and nothing is lost but the trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.delta import Delta, applied, extract_delta
from trace_dist.bank.recipe import GROUPS, Part, Recipe, taken
from trace_dist.bank.signature import Signature
from trace_dist.config.checks import Section
from trace_dist.continual.learn import apart, try_mask
from trace_dist.continual.race import split
from trace_dist.continual.setting import Setting
from trace_dist.continual.starts.base import Begun, Start
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.combination import CombinationLearner
from trace_dist.train.task import train_learner
from trace_dist.train.validation import answer_loss
from trace_dist.train.workbench import Stream
from trace_dist.utils.finite import NotFinite
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
    """Steps of the fit."""
    trial_steps: int = 20
    """Steps that the task's own mask is trained from the combination, and from the base, to see which helps; 0 compares the two
    as they are."""
    batch_size: int | None = None
    """Examples of a step of the fit and of the trial; `train.batch_size` when not set."""
    lr: float = 0.1
    """Peak step of a scalar; 1 is the whole of an earlier delta."""
    l1: float = 0.1
    """What a scalar loses after each step, as a share of the step's peak length; scalars that win less stay at 0."""
    l2: float = 0.01
    """What a scalar loses after each step, as a share of itself for a step of length 1."""
    least_gain: float = 0.05
    """Share of the held-out answer loss that the combination must win, before the trial and after it, or the task begins at the
    base."""

    def check(self) -> None:
        self.at_least(1, "candidates", "steps", "batch_size")
        self.positive("lr")
        self.at_least(0, "trial_steps", "l1", "l2", "least_gain")

    def batch(self, usual: int) -> int:
        """Examples of a step of the fit and of the trial."""
        return usual if self.batch_size is None else self.batch_size

    def most_examples(self, usual: int) -> int:
        """What fit and trial read together, where there is a trial."""
        return self.batch(usual) * (self.steps + 2 * self.trial_steps)


class Combination(Start):
    """Earlier deltas, each times a few scalars."""

    label = "from a combination of earlier tasks"

    def begin(
        self,
        setting: Setting,
        bank: DeltaBank,
        stream: Stream,
        mask: Mask,
        signature: Signature,
        name: str,
        lr: float | None = None,
    ) -> Begun:
        deltas = self._candidates(setting.model, bank, stream.task.name, mask, signature)
        if not deltas:
            return Begun()
        with random_numbers_kept():
            setting.seed(stream.task.name)
            work = _Work(setting, stream, self.options, name)
            begun = self._fitted(work, bank, deltas)
            if begun.delta is None:
                return begun
            changed = begun.delta.mask
            if (mask | changed).num_entries == changed.num_entries:
                logger.info("%s: a combination changes all of its mask; it begins at the base", work.task)
                return _refused(begun.facts)
            if self.options.trial_steps == 0:
                return begun
            return _tried(work, begun, mask, setting.cfg.train.rate if lr is None else lr)

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

    def _fitted(self, work: _Work, bank: DeltaBank, deltas: Sequence[Delta]) -> Begun:
        """The combination that the fit has found, where it lowers the held-out loss. Collective."""
        options, setting, task = self.options, work.setting, work.task
        learner = CombinationLearner(setting.model, deltas, options.lr, options.l1, options.l2)
        try:
            before = answer_loss(learner, work.heldout)
            # Peak and schedule are the fit's own; nothing is kept of a few steps.
            train = replace(setting.cfg.train.strict(), lr=options.lr, checkpoint_every=0, warmup_steps=0)
            train_learner(
                learner,
                work.batches(),
                train,
                options.steps,
                description=f"{work.name}/{task}: combination",
                rate="bank.composition_options.lr",
            )
            after = answer_loss(learner, work.heldout)
            scalars = learner.scalars.detach().cpu()
            used = [row for row in range(len(deltas)) if bool(scalars[row].any())]
            shares = _rows(deltas, scalars)
            changed = taken([delta.mask for delta in deltas], list(shares.values()))
            facts = {
                "scalars": shares,
                "base_loss": before,
                "loss": after,
                "examples": options.steps * work.batch_size,
            }
            if changed is None or not after <= (1 - options.least_gain) * before:
                logger.info("%s: earlier tasks do not help (loss %.4f, base %.4f)", task, after, before)
                return _refused(facts)
            setting.model.detach()
            begun = extract_delta(setting.model, changed.with_meta(model=setting.fingerprint), task)
        finally:
            learner.restore()
        shown = ", ".join(f"{deltas[row].task} {_shown(scalars[row])}" for row in used)
        logger.info("%s: a combination of %s (loss %.4f, base %.4f)", task, shown, after, before)
        recipe = _recipe(bank, [deltas[row] for row in used], scalars[used])
        return Begun(begun, {**facts, "used": True}, recipe)


class _Work:
    """What the steps of a start have in common: a part of a task's examples, and those held out."""

    def __init__(self, setting: Setting, stream: Stream, options: Options, name: str) -> None:
        self.setting, self.options, self.name, self.task = setting, options, name, stream.task.name
        self._part, heldout = split(stream, setting.cfg.race, setting.cfg.seed)
        self.heldout = setting.bench.one_batch([heldout.encoded])
        self.batch_size = options.batch(setting.cfg.train.batch_size)

    def batches(self) -> Batches:
        """From the first one."""
        return self.setting.bench.batches([self._part], self.batch_size)

    def trained(self, mask: Mask, lr: float) -> float:
        """The held-out loss after the trial's steps from what the model holds, which it then holds again; infinite where they
        diverge. Collective."""
        self.setting.seed(self.task)
        label, steps = f"{self.name}/{self.task}: trial", self.options.trial_steps
        try:
            with try_mask(self.setting, mask, self.batches(), lr, steps, name=label) as learner:
                return answer_loss(learner, self.heldout)
        except NotFinite:
            return math.inf


def _tried(work: _Work, begun: Begun, mask: Mask, lr: float) -> Begun:
    """A combination that has stood its trial; otherwise what is known of it alone. Collective. See [Note: trial].

    Args:
        work: the task.
        begun: from the combination.
        mask: the task's, of which the combination leaves something.
        lr: peak rate with which it is trained.
    """
    if begun.delta is None:
        raise AssertionError(f"{work.task}: there is no combination to try")
    own, options = apart(mask, begun.delta.mask, work.task), work.options
    alone = work.trained(mask, lr)
    with applied(work.setting.model, begun.delta):
        loss = work.trained(own, lr)
    helps = math.isfinite(loss) and loss <= (1 - options.least_gain) * alone
    verdict = "it begins there" if helps else "it begins at the base"
    logger.info(
        "%s: after %d steps from there loss %.4f, from the base %.4f: %s",
        work.task, options.trial_steps, loss, alone, verdict,
    )  # fmt: skip
    trial = {
        name: value if math.isfinite(value) else None
        for name, value in (("loss", loss), ("base_loss", alone))
    }
    facts = {
        **begun.facts,
        "examples": options.most_examples(work.setting.cfg.train.batch_size),
        "trial": {"steps": options.trial_steps, **trial},
    }
    return replace(begun, facts=facts) if helps else _refused(facts)


def _refused(facts: dict[str, Any]) -> Begun:
    """The base: all scalars are 0; ``fitted`` says what they were."""
    fitted = facts["scalars"]
    zero = {task: dict.fromkeys(row, 0.0) for task, row in fitted.items()}
    return Begun(facts={**facts, "scalars": zero, "fitted": fitted, "used": False})


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


def _rows(deltas: Sequence[Delta], scalars: Tensor) -> dict[str, dict[str, float]]:
    """The scalars by task and group."""
    return {
        delta.task: dict(zip(GROUPS, row.tolist(), strict=True))
        for delta, row in zip(deltas, scalars, strict=True)
    }


def _shown(row: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in row.tolist())


START = Combination
