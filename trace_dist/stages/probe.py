"""Stage ``probe``: warm-start the proxy on every task; write saliency maps, proxy masks and specificity.

A task whose trace is there is not probed again, so that a stage that was cut continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.sketch import Sketch, cosines
from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.continual.driver import method_class
from trace_dist.continual.progress import examples_digest
from trace_dist.continual.race import split
from trace_dist.data.modality import TEXT
from trace_dist.data.validation import MOST_HELDOUT
from trace_dist.masks.ops import layouts_for, mask_from_scores
from trace_dist.masks.storage import save_saliency
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model
from trace_dist.probe.importance.contrast import Contrast, contrasts
from trace_dist.probe.learning import HeldOut, Learning, chance_loss
from trace_dist.probe.specificity import cosine_matrix, specificity, tensor_specificity
from trace_dist.probe.task import Probed, probe_task
from trace_dist.projection.project import needs_proxy
from trace_dist.stages.base import prepare_base
from trace_dist.stages.stage import ALONE, Stage
from trace_dist.stages.words import fall, listed
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger, outcome

logger = get_logger(__name__)
ALIKE = 1e-6
"""Specificity below which two updates differ by rounding alone."""


def describe(cfg: RunConfig) -> Stage:
    """Probe all tasks; the proxy is made where it is missing."""
    folder, names = cfg.folder, [task.name for task in cfg.tasks]
    kinds = (folder.sketch, folder.saliency, folder.proxy_mask)
    masks = [path(name) for name in names for path in kinds]
    return Stage("probe", ["probe", *ALONE], [*masks, folder.specificity])


@dataclass(frozen=True)
class Proxy:
    """The proxy of a run, ready to be probed.

    Attributes:
        cfg: the run.
        module: the model, fp32.
        model_id: its fingerprint.
        layouts: its maskable parameters.
        bench: the run's data, in its tokens.
    """

    cfg: RunConfig
    module: nn.Module
    model_id: str
    layouts: dict[str, UnitLayout]
    bench: Workbench

    @classmethod
    def load(cls, cfg: RunConfig) -> Proxy:
        """Make the proxy unless it is there, and load it (the target itself where there is none)."""
        path = prepare_base(cfg, "proxy")
        bench = Workbench.load(cfg, path)
        module = load_model(path, torch.float32)
        layouts = layouts_for(module, cfg.mask.granularity, cfg.mask.block, cfg.mask.maskable)
        return cls(cfg, module, fingerprint(path), layouts, bench)

    def kept(self, task: str) -> Probed | None:
        """What the proxy has shown of one task before, in this way; read from the run folder."""
        folder = self.cfg.folder
        return Probed.load(
            folder.trace(task), folder.sketch(task), self.model_id, self.cfg.probe, self._examples[task]
        )

    @cached_property
    def _examples(self) -> dict[str, str]:
        """Task -> digest of its examples."""
        streams = (*self.bench.tasks, *self.bench.general)
        return {stream.task.name: examples_digest([stream]) for stream in streams}

    def probe(self, stream: Stream) -> Probed:
        """What the proxy shows of one task; kept in the run folder, and measured once."""
        cfg, task = self.cfg, stream.task.name
        path = cfg.folder.trace(task)
        found = self.kept(task)
        if found is not None:
            logger.info("probe %s: kept the trace %s", task, path)
            return found
        steps = cfg.probe.num_steps(len(stream.encoded))
        # Chance is known of texts alone.
        measured = steps > 0 and cfg.data.modality == TEXT
        stream, heldout = self._apart(stream, steps) if measured else (stream, None)
        probe, own = cfg.probe, None
        if probe.fisher_batch_size is not None:
            own = self.bench.batches([stream], probe.fisher_batch_size)
        found = probe_task(
            self.module,
            self.model_id,
            self.layouts,
            self.bench.batches([stream], probe.batch_size),
            replace(probe, steps=steps, epochs=None),
            cfg.train,
            cfg.probed.dtype,
            f"probe {task}",
            own,
            heldout,
        )
        found.save(path, cfg.folder.sketch(task), probe, self._examples[task])
        return found

    def _apart(self, stream: Stream, steps: int) -> tuple[Stream, HeldOut]:
        """What is trained on, and examples that are not: the validation examples, or those that so many steps do not read; where
        they read all, a part is held out as in the race for a rate."""
        encoded, cfg = stream.encoded, self.cfg
        if stream.validation is not None:
            rows = stream.validation
        else:
            read = self.bench.batches([stream], cfg.probe.batch_size).rows_ahead(steps)
            count = max(1, min(cfg.race.heldout, int(MOST_HELDOUT * len(encoded))))
            rest = list(islice(self._unread(encoded, read), count))
            if len(rest) == count:
                rows = encoded.select(sorted(rest))
                encoded = encoded.select(sorted(read))
            else:
                stream, other = split(stream, cfg.race, cfg.seed)
                encoded, rows = stream.encoded, other.encoded
        return stream, HeldOut(self.bench.one_batch([rows]), len(rows), chance_loss(encoded, rows))

    def _unread(self, encoded: datasets.Dataset, read: set[int]) -> Iterator[int]:
        """Rows outside some others that are not equal to one of them, in an order of the seed."""
        seen = {tuple(each) for each in encoded.select(sorted(read))["input_ids"]}
        for row in map(int, np.random.default_rng(self.cfg.seed).permutation(len(encoded))):
            if row not in read and tuple(encoded[row]["input_ids"]) not in seen:
                yield row

    def write(self, task: str, scores: Mapping[str, Tensor]) -> None:
        """Write a task's saliency map and the proxy's mask."""
        cfg, method = self.cfg, self.cfg.probe.score
        meta = {"task": task, "model": self.model_id, "method": method, "probe": asdict(cfg.probe)}
        save_saliency(cfg.folder.saliency(task), dict(scores), self.layouts, meta)
        of = cfg.largest.mask
        mask = mask_from_scores(scores, self.layouts, of.granularity, of.share, of.spread)
        # One of a density that is raced for is made anew from the scores.
        raced = {"raced": True} if cfg.mask.density == AUTO else {}
        mask.with_meta(task=task, model=self.model_id, method=method, **raced).save(
            cfg.folder.proxy_mask(task)
        )
        logger.info(
            "probe %s: %d units of %d tensors", task, sum(map(len, mask.units.values())), len(mask)
        )  # fmt: skip


def run_probe(cfg: RunConfig) -> None:
    """Probe every task of a run on its proxy.

    Raises:
        ValueError: several ranks were started.
    """
    if dist.world_size() > 1:
        raise ValueError(
            f"probe: the proxy is probed in one process, but {dist.world_size()} ranks were started; start one"
        )
    proxy = Proxy.load(cfg)
    names = [stream.task.name for stream in proxy.bench.tasks]
    contrast = Contrast(cfg.probe.score) if contrasts(cfg.probe.score) else None
    sketches, losses = dict[str, Sketch](), dict[str, list[tuple[int, float]]]()
    learning: dict[str, Learning] = {}
    for stream in [*proxy.bench.tasks, *(proxy.bench.general if contrast else [])]:
        # Its scores are read again below, so that those of one task are held, however many there are.
        probed = proxy.probe(stream)
        if contrast is not None:
            contrast.add(probed.scores)
        if stream.task.name in names:
            sketches[stream.task.name], losses[stream.task.name] = probed.sketch, probed.losses
            if probed.learning is not None:
                learning[stream.task.name] = probed.learning
                _check_learned(cfg, stream.task.name, probed.learning)
    earlier = _earlier(cfg, list(sketches.values()), exclude=names)
    for task, sketch in sketches.items():
        others = [other for name, other in (earlier | sketches).items() if name != task]
        proxy.write(task, _scores(proxy, task, contrast, tensor_specificity(sketch, others)))
    cosine = cosine_matrix(list((earlier | sketches).values()))
    write_json(
        cfg.folder.specificity,
        {
            "tasks": [*earlier, *sketches],
            "cosine": cosine.tolist(),
            "specificity": specificity(cosine).tolist(),
            "losses": losses,
            "learning": {task: each.to_json() for task, each in learning.items()},
        },
    )
    told = f"{listed(losses)}: {fall(losses.values())}"
    missed = [task for task, each in learning.items() if not each.is_learned(cfg.probe.margin)]
    outcome(f"{told}; not learned: {listed(missed)}" if missed else told)


def _check_learned(cfg: RunConfig, task: str, learning: Learning) -> None:
    """Say how a probe did; warn, or raise ValueError, where it has not learned its task."""
    if learning.is_learned(cfg.probe.margin):
        logger.info("probe %s: %s", task, learning)
        return
    said = (
        f"probe.margin={cfg.probe.margin:g}: the probe has not learned {task!r} ({learning}), so its mask shows nothing; raise "
        "probe.steps or probe.lr, heal a pruned proxy (proxy.prune.heal_steps), or take a larger one"
    )
    if cfg.probe.unlearned == "refuse":
        raise ValueError(f"{said}; or set probe.unlearned: warn")
    logger.warning(said)


def _scores(
    proxy: Proxy, task: str, contrast: Contrast | None, weight: Mapping[str, float]
) -> dict[str, Tensor]:
    """A task's unit scores, beside those of the others where the score compares, and weighed by specificity."""
    probed, exponent = proxy.kept(task), proxy.cfg.probe.specificity_weight
    if probed is None:
        raise AssertionError(f"{task}: was probed, but its trace is not there")
    scores = probed.scores if contrast is None else contrast.of(probed.scores)
    if exponent == 0:
        return scores
    if max(weight.values()) < ALIKE:
        logger.warning(
            "probe %s: its update is that of another task in every tensor, so probe.specificity_weight tells none apart; it is "
            "left out for this task",
            task,
        )
        return scores
    return {name: score * weight[name] ** exponent for name, score in scores.items()}


def needs_probe(cfg: RunConfig) -> bool:
    """Whether anything of a run reads what the probe leaves."""
    return needs_proxy(cfg.projection) or any(
        method_class(name).reads_probe for name in cfg.continual.methods
    )


def _earlier(cfg: RunConfig, new: list[Sketch], exclude: list[str]) -> dict[str, Sketch]:
    """Sketches of the bank's tasks that this proxy was probed with; the others are named in the log."""
    folder = cfg.bank_of()
    if not folder.index.is_file():
        return {}
    bank, found = DeltaBank(folder.root), dict[str, Sketch]()
    for task in bank.tasks:
        sketch = None if task in (BASE, *exclude) else bank.sketch(task)
        if sketch is None:
            continue
        try:
            cosines(new[0], [sketch])
        except ValueError as error:
            logger.warning("probe: not compared with %s of the bank (%s)", task, error)
        else:
            found[task] = sketch
    return found
