"""Learn one task: train its mask from the base, keep the delta in a bank, put the base back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from torch import Tensor

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.bank.recipe import Recipe
from trace_dist.bank.signature import Signature
from trace_dist.bank.sketch import Sketch
from trace_dist.config.checks import check
from trace_dist.continual.earlier import changes_in
from trace_dist.continual.progress import examples_digest, keep_trained, kept_trained
from trace_dist.continual.prompts import to_keep
from trace_dist.continual.setting import Setting
from trace_dist.continual.starts.base import Begun, load_start
from trace_dist.data.batches import Batches
from trace_dist.masks.mask import Mask
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.learner import Learner
from trace_dist.train.loop import TrainResult
from trace_dist.train.task import train_mask
from trace_dist.train.workbench import Stream
from trace_dist.utils.env import code_version
from trace_dist.utils.log import get_logger
from trace_dist.utils.shared_files import present
from trace_dist.utils.together import on_all, on_main

logger = get_logger(__name__)


def learn_task(
    setting: Setting, bank: DeltaBank, stream: Stream, mask: Mask, *, name: str, lr: float | None = None
) -> TrainResult:
    """Learn one task into a bank, which may hold tasks of other runs. Collective.

    A task that the bank holds is not trained again. One whose training was cut goes on from its newest checkpoint.

    Args:
        setting: the run; its model holds the base, before and after.
        bank: of the same base.
        stream: the task.
        mask: what may change.
        name: of the method, for its files and logs.
        lr: peak learning rate; ``train.lr`` when None.

    Returns:
        What the training measured; empty for a task that another run trained.

    Raises:
        ValueError: the bank holds another task of this name.
    """
    task, kept = stream.task.name, setting.folder.progress(name)
    if task in bank.tasks:
        _check_same(bank, stream, mask)
        return kept_trained(kept, task) or TrainResult()
    signature = setting.judge.signature(setting.model, [stream], task, bank.layer, bank.pooling)
    _check_spread(setting, signature)
    others = [other for other in bank.tasks if other not in (BASE, task)]
    begun = load_start(setting.cfg.bank).begin(setting, bank, stream, mask, signature, name, lr)
    own = mask if begun.delta is None else apart(mask, begun.delta.mask, task)
    recipe = _recipe(setting, begun, task)
    changes = changes_in(bank, setting.model, mask.meta.get("earlier", others), task)
    scale = setting.isolation.scale(own, changes)
    batches = setting.bench.batches([stream], setting.cfg.train.batch_size)
    adapted = None
    with applied(setting.model, begun.delta):
        before = Snapshot(setting.model, own)
        result = train_stream(setting, stream, own, batches, name=name, lr=lr, scale=scale)
        whole = own if begun.delta is None else (own | begun.delta.mask).with_meta(**mask.meta)
        delta = extract_delta(setting.model, whole if recipe is None else own, task)
        if setting.cfg.bank.representation == "adapted":
            adapted = setting.judge.signature(setting.model, [stream], task, bank.layer, bank.pooling)
        before.restore()
    # Before the delta: what lies in the bank is never trained again, so nothing could measure it later.
    keep_trained(kept, task, result)
    rate = setting.cfg.train.rate if lr is None else lr
    facts = {
        "lr": rate,
        "steps": stream.steps,
        "examples": examples_digest([stream]),
        "mask": dict(mask.meta),
        "code": code_version(),
    }
    if begun.facts:
        facts |= {"composition": begun.facts, "mask_digest": mask.digest()}
    if result.kept_step is not None:
        facts["kept_step"] = result.kept_step
    # A mask that was given comes without a probe.
    path = setting.folder.sketch(task)
    sketch = on_all(lambda: Sketch.load(present(path))) if on_main(path.is_file) else None
    prompts = to_keep(setting, [stream])
    bank.add(signature, delta, sketch=sketch, facts=facts, prompts=prompts, adapted=adapted, recipe=recipe)
    return result


def _check_spread(setting: Setting, signature: Signature) -> None:
    """Raise ValueError, before the training, where a task's own weights shall judge prompts, and its own are all the same."""
    way = setting.cfg.bank.representation
    rule = (
        f"all prompts of task {signature.task!r} are the same, and nothing says how far another one may lie"
    )
    cure = "give it different prompts, or use base"
    check(way != "adapted" or signature.has_spread, "bank.representation", way, rule, cure)


def _recipe(setting: Setting, begun: Begun, task: str) -> Recipe | None:
    """The recipe that a task is kept as; None where it is kept whole.

    Raises:
        ValueError: it shall be kept as one, but what it begins with is made of something else than the bank's deltas.
    """
    cfg = setting.cfg.bank
    if cfg.keep == "whole" or begun.delta is None:
        return None
    if begun.recipe is None:
        raise ValueError(
            f"bank.keep='recipe': task {task!r} begins with what {cfg.composition!r} has made, which gives no recipe; set "
            "bank.keep: whole"
        )
    return begun.recipe


def _check_same(bank: DeltaBank, stream: Stream, mask: Mask) -> None:
    """Raise ValueError where a task in the bank has the name of this one alone."""
    task = stream.task.name
    training = bank.facts(task).get("training", {})
    examples, digest = training.get("examples"), training.get("mask_digest")
    # One that began with earlier deltas holds their entries beside those of its mask.
    same = bank.mask(task) == mask if digest is None else mask.has_digest(digest)
    differs = "examples" if same else "mask"
    if differs == "mask" or examples not in (None, examples_digest([stream])):
        raise ValueError(
            f"tasks.name={task!r}: the bank {bank.folder} holds a task of this name with other {differs}; "
            "rename the task, or remove the one in the bank"
        )


def apart(mask: Mask, taken: Mask, task: str) -> Mask:
    """A task's own mask without the entries that it begins with from earlier tasks, so that the two are orthogonal.

    Raises:
        ValueError: they have other units, or nothing is left.
    """
    try:
        own = mask - taken
    except ValueError as error:
        raise ValueError(
            f"bank.composition: task {task!r}: {error}; set mask.isolation: exclusive, or bank.composition: none"
        ) from None
    logger.info("%s: its own mask keeps %d of %d entries", task, own.num_entries, mask.num_entries)
    return own.with_meta(**mask.meta)


def train_stream(
    setting: Setting,
    stream: Stream,
    mask: Mask,
    batches: Batches,
    *,
    name: str,
    lr: float | None = None,
    scale: Mapping[str, Tensor] | None = None,
) -> TrainResult:
    """Train one task's mask from the values that the model holds, with logs and checkpoints; it then holds the tuned ones.

    Collective. Arguments as ``learn_task``; ``batches`` are the task's, ``scale`` factors on the learning rate (MaskedAdamW).
    """
    cfg = setting.cfg.train
    module = setting.model.module
    validation = setting.validation([stream], lambda task: setting.judge.evaluate(module, task).value)
    with setting.training(name, stream.task.name) as options:
        result, _ = train_mask(
            setting.model,
            mask,
            batches,
            cfg if lr is None else replace(cfg, lr=lr),
            stream.steps,
            scale=scale,
            validation=validation,
            rate="train.lr" if lr is None else f"continual.options.{name}.lr",
            **options,
        )
    setting.model.detach()
    return result


@contextmanager
def try_mask(
    setting: Setting,
    mask: Mask,
    batches: Batches,
    lr: float,
    steps: int,
    *,
    horizon: int | None = None,
    name: str,
) -> Iterator[Learner]:
    """Train a mask without checkpoints and logs; the model holds the result inside the block alone. Collective.

    ``horizon`` is as of ``make_schedule``.

    Raises:
        NotFinite: training diverges; the model holds what it held before.
    """
    cfg = replace(setting.cfg.train.strict(), lr=lr)
    with put_back(setting.model, mask):
        _, learner = train_mask(
            setting.model,
            mask,
            batches,
            cfg,
            steps,
            horizon=horizon,
            description=f"{name} at {lr:g}",
            rate="race.grid",
        )
        setting.model.detach()
        yield learner


def try_rate(
    setting: Setting, mask: Mask, whole: Stream, part: Stream, lr: float, *, name: str
) -> AbstractContextManager[Learner]:
    """A learning rate's trial in a race: the beginning of a task's training, on a part of its examples. See ``try_mask``."""
    batches = setting.bench.batches([part], setting.cfg.train.batch_size)
    return try_mask(setting, mask, batches, lr, part.steps, horizon=whole.steps, name=name)


@contextmanager
def put_back(model: ShardedModel, mask: Mask) -> Iterator[None]:
    """After the block, however it ends, a mask's entries are as before, bit for bit, and collect no gradients. Collective."""
    before = Snapshot(model, mask)
    try:
        yield
    finally:
        model.detach()
        before.restore()
