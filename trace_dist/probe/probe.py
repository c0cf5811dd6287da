"""Stage ``probe``: warm-start the proxy on every task; write saliency maps, proxy masks and specificity.

<run_dir>/probe/<task>.safetensors     saliency map: one fp32 score per unit
<run_dir>/probe/masks/<task>.safetensors   the proxy's mask at the wanted density
<run_dir>/probe/specificity.json       cosine matrix and specificity of the tasks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from trace_dist.config import RunConfig
from trace_dist.masks.ops import layouts_for, mask_from_scores
from trace_dist.masks.storage import save_saliency
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model
from trace_dist.probe.importance import unit_importance
from trace_dist.probe.specificity import cosine_matrix, specificity, tensor_specificity
from trace_dist.probe.warm_start import Trace, warm_start
from trace_dist.train.bases import prepare_base
from trace_dist.train.workbench import Workbench
from trace_dist.utils.files import write_json
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def probe_folder(cfg: RunConfig) -> Path:
    """Where the probe's files lie."""
    return Path(cfg.run_dir) / "probe"


def proxy_mask_path(cfg: RunConfig, task: str) -> Path:
    """The proxy's mask of a task."""
    return probe_folder(cfg) / "masks" / f"{task}.safetensors"


def run_probe(cfg: RunConfig) -> None:
    """Probe every task of a run on its proxy (the target itself where there is none)."""
    path = prepare_base(cfg.probed, cfg, "proxy")
    bench = Workbench.load(cfg, path)
    module = load_model(path, torch.float32)
    mask = cfg.mask
    layouts = layouts_for(module, mask.granularity, mask.block, mask.maskable)
    model_id = fingerprint(path)
    traces = {}
    for stream in bench.tasks:
        batches = bench.batches([stream], cfg.probe.batch_size)
        task = stream.task.name
        traces[task] = warm_start(
            module, list(layouts), batches, cfg.probe, cfg.train, cfg.probed.dtype, f"probe {task}"
        )
    names = list(layouts)
    weights = tensor_specificity([trace.update for trace in traces.values()], names)
    for (task, trace), weight in zip(traces.items(), weights, strict=True):
        scores = _weighted(
            unit_importance(trace, layouts, cfg.probe.score), weight, cfg.probe.specificity_weight
        )
        meta = {"task": task, "model": model_id, "method": cfg.probe.score, "probe": asdict(cfg.probe)}
        save_saliency(probe_folder(cfg) / f"{task}.safetensors", scores, layouts, meta)
        proxy_mask = mask_from_scores(scores, layouts, mask.granularity, mask.density)
        proxy_mask.with_meta(task=task, model=model_id, method=cfg.probe.score).save(
            proxy_mask_path(cfg, task)
        )
        logger.info(
            "probe %s: %d units of %d tensors",
            task,
            sum(map(len, proxy_mask.units.values())),
            len(proxy_mask),
        )
    _write_specificity(cfg, traces, names)


def _weighted(scores: dict[str, Tensor], weight: Mapping[str, float], exponent: float) -> dict[str, Tensor]:
    if exponent == 0:
        return scores
    return {name: score * weight[name] ** exponent for name, score in scores.items()}


def _write_specificity(cfg: RunConfig, traces: Mapping[str, Trace], names: list[str]) -> None:
    cosine = cosine_matrix([trace.update for trace in traces.values()], names)
    write_json(
        probe_folder(cfg) / "specificity.json",
        {
            "tasks": list(traces),
            "cosine": cosine.tolist(),
            "specificity": specificity(cosine).tolist(),
            "losses": {task: trace.losses for task, trace in traces.items()},
        },
    )
