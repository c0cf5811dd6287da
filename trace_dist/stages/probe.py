"""Stage ``probe``: warm-start the proxy on every task; write saliency maps, proxy masks and specificity.

A task whose trace is there is not probed again, so that a stage that was cut continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.bank.sketch import Sketch, cosines
from trace_dist.config import RunConfig
from trace_dist.masks.ops import layouts_for, mask_from_scores
from trace_dist.masks.storage import save_saliency
from trace_dist.masks.units import UnitLayout
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model
from trace_dist.probe.specificity import cosine_matrix, specificity, tensor_specificity
from trace_dist.probe.task import Probed, probe_task
from trace_dist.stages.base import prepare_base
from trace_dist.stages.stage import ALONE, Stage
from trace_dist.stages.words import fall, listed
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger, outcome

logger = get_logger(__name__)


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

    def probe(self, stream: Stream) -> Probed:
        """What the proxy shows of one task; kept in the run folder, and measured once."""
        cfg, task = self.cfg, stream.task.name
        path, sketch = cfg.folder.trace(task), cfg.folder.sketch(task)
        found = Probed.load(path, sketch, self.model_id, cfg.probe)
        if found is not None:
            logger.info("probe %s: kept the trace %s", task, path)
            return found
        batches = self.bench.batches([stream], cfg.probe.batch_size)
        found = probe_task(
            self.module,
            self.model_id,
            self.layouts,
            batches,
            cfg.probe,
            cfg.train,
            cfg.probed.dtype,
            f"probe {task}",
        )
        found.save(path, sketch, cfg.probe)
        return found

    def write(self, task: str, scores: Mapping[str, Tensor]) -> None:
        """Write a task's saliency map and the proxy's mask."""
        cfg, method = self.cfg, self.cfg.probe.score
        meta = {"task": task, "model": self.model_id, "method": method, "probe": asdict(cfg.probe)}
        save_saliency(cfg.folder.saliency(task), dict(scores), self.layouts, meta)
        mask = mask_from_scores(scores, self.layouts, cfg.mask.granularity, cfg.mask.density)
        mask.with_meta(task=task, model=self.model_id, method=method).save(cfg.folder.proxy_mask(task))
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
    found = {stream.task.name: proxy.probe(stream) for stream in proxy.bench.tasks}
    sketches = {task: probed.sketch for task, probed in found.items()}
    earlier = _earlier(cfg, list(sketches.values()), exclude=list(found))
    for task, probed in found.items():
        others = [sketch for name, sketch in (earlier | sketches).items() if name != task]
        weight = tensor_specificity(probed.sketch, others)
        proxy.write(task, _weighted(probed.scores, weight, cfg.probe.specificity_weight))
    cosine = cosine_matrix(list((earlier | sketches).values()))
    write_json(
        cfg.folder.specificity,
        {
            "tasks": [*earlier, *sketches],
            "cosine": cosine.tolist(),
            "specificity": specificity(cosine).tolist(),
            "losses": {task: probed.losses for task, probed in found.items()},
        },
    )
    outcome(f"{listed(found)}: {fall([probed.losses for probed in found.values()])}")


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


def _weighted(scores: dict[str, Tensor], weight: Mapping[str, float], exponent: float) -> dict[str, Tensor]:
    if exponent == 0:
        return scores
    return {name: score * weight[name] ** exponent for name, score in scores.items()}
