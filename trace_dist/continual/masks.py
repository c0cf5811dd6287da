"""A task's masks of the target, made from the proxy's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.config.mask import Density
from trace_dist.continual.earlier import check_room
from trace_dist.continual.progress import examples_digest
from trace_dist.continual.proxy import proxy_module, proxy_origin
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, mask_from_scores, place, random_mask
from trace_dist.masks.select import Units
from trace_dist.masks.storage import load_saliency
from trace_dist.models.fingerprint import same_model
from trace_dist.projection.project import (
    TRANSFERRED,
    needs_module,
    needs_proxy,
    needs_scores,
    project_task,
    project_tensors,
)
from trace_dist.projection.site import Shown
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.workbench import Stream, Workbench
from trace_dist.utils.log import get_logger
from trace_dist.utils.shared_files import present
from trace_dist.utils.together import on_all, on_main

T = TypeVar("T")
logger = get_logger(__name__)
KINDS = ("projected", "random")
PROBED = "probed"
"""What made the masks of a target that was probed itself."""


def project_stream(
    model: ShardedModel,
    cfg: RunConfig,
    bench: Workbench,
    stream: Stream,
    model_id: str,
    refused: Mapping[str, Units],
    meta: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write one task's projected mask, and a random one of the same density for comparison. Collective.

    Args:
        model: the target, which is left as it was.
        cfg: the run.
        bench: its data.
        stream: the task.
        model_id: fingerprint of the target.
        refused: by kind of mask (KINDS), the units that the task may not have.
        meta: by kind of mask, what the mask shall say beside.

    Raises:
        ValueError: the proxy has not been probed, or there is no room for the task.
    """
    mask, task = cfg.mask, stream.task.name
    layouts = layouts_for(model, mask.granularity, mask.block, mask.maskable)
    for kind in KINDS:
        check_room(layouts, mask.share, refused[kind], task, mask.isolation, mask.share_of)
    index = [other.task.name for other in bench.tasks].index(task)
    # The projected one is written last: where it lies, both do.
    masks = {
        "random": random_mask(
            layouts, mask.granularity, mask.share, cfg.seed + index, refused["random"], mask.spread
        ),
        "projected": projected_mask(model, cfg, bench, stream, model_id, refused["projected"]),
    }

    always = bench.modality.always(model.module, stream.task, mask)
    masks = {kind: made.with_elements(always) for kind, made in masks.items()}
    examples = examples_digest([stream])

    def write() -> None:
        for kind, made in masks.items():
            told = {
                "task": task,
                "model": model_id,
                "density": mask.share,
                "examples": examples,
                **meta[kind],
            }
            made.with_meta(**told).save(cfg.folder.mask(task, kind))

    on_main(write)
    projected = masks["projected"]
    logger.info("project %s: %s, density %.4f", task, projected.meta["method"], projected.density)
    if "matching" in projected.meta:
        logger.info("project %s: %s", task, _told(projected.meta["matching"]))
    for kind, units in refused.items():
        if units:
            held = sum(int(layouts[name].sizes(indices).sum()) for name, indices in units.items())
            logger.info(
                "project %s: the %s mask keeps off %d entries of earlier tasks (%s)",
                task,
                kind,
                held,
                mask.isolation,
            )


def _told(matching: Mapping[str, Any]) -> str:
    """What of a mask was matched to the proxy, in words."""
    counts = (
        f"{by} {found['entries']} entries of {found['tensors']} tensors"
        for by, found in matching.items()
        if "entries" in found
    )
    why = "; ".join(f"{reason} ({count} tensors)" for reason, count in matching["nothing"]["why"].items())
    return f"by {', by '.join(counts)}" + (f"; {why}" if why else "")


def is_projected(cfg: RunConfig, task: str, model_id: str) -> bool:
    """Whether a task's masks of this target, by this placement and isolation and at this density, are there.

    Raises:
        ValueError: one of them is corrupt.
    """
    for kind, method in (("projected", _maker(cfg)), ("random", "random")):
        path = cfg.folder.mask(task, kind)
        if not path.is_file():
            return False
        mask = Mask.load(path)
        if not (is_made(mask, model_id, method, cfg.mask.isolation) and is_at(mask, cfg.mask.density)):
            return False
    return True


def is_made(mask: Mask, model_id: str, method: str, isolation: str) -> bool:
    """Whether a mask is of a model, and was made by a method under an isolation."""
    found = mask.meta.get("method"), mask.meta.get("isolation", "shared")
    return same_model(str(mask.meta.get("model")), model_id) and found == (method, isolation)


def is_at(mask: Mask, density: Density) -> bool:
    """Whether a mask was made at a density, as it says itself: one that was given says nothing, nor does an earlier release's."""
    return density == AUTO or mask.meta.get("density", density) == density


def masks_made_with(cfg: RunConfig) -> dict[str, Any]:
    """The sections of a configuration that say which masks are trained, as plain values."""
    return {section: asdict(cfg)[section] for section in ("mask", "projection", "probe")}


def _maker(cfg: RunConfig) -> str:
    """What makes the projected masks of a run, as they say themselves."""
    if needs_proxy(cfg.projection):
        if cfg.proxy is None:
            return PROBED
        if cfg.mask.granularity == "tensor":
            return TRANSFERRED
    return f"projected/{cfg.projection.placement}"


def projected_mask(
    model: ShardedModel, cfg: RunConfig, bench: Workbench, stream: Stream, model_id: str, refused: Units
) -> Mask:
    """One task's projected mask. Collective; the arguments are those of ``project_stream``.

    Raises:
        ValueError: the proxy has not been probed.
    """
    maker, task, proxy_mask, shown = _maker(cfg), stream.task.name, None, None
    if needs_proxy(cfg.projection):
        proxy_mask = _proxy_mask(cfg, task)
        if cfg.mask.granularity == "tensor":
            return _transferred(model, cfg, task, refused).with_meta(method=maker)
        if maker == PROBED:
            return _chosen_again(proxy_mask, cfg.folder.saliency(task), refused)
        if needs_scores(cfg.projection):
            scores, layouts, _ = read_probed(cfg.folder.saliency(task), load_saliency)
            module = on_all(lambda: proxy_module(cfg, bench)) if needs_module(cfg.projection) else None
            shown = Shown(scores, layouts, proxy_origin(cfg, model, model_id), module)
    return project_task(
        model,
        proxy_mask,
        task,
        lambda: bench.batches([stream], cfg.probe.batch_size),
        mask=cfg.mask,
        projection=cfg.projection,
        probe=cfg.probe,
        train=cfg.train,
        seed=cfg.seed,
        refused=refused,
        shown=shown,
    )


def probed_file(path: Path) -> Path:
    """A file that the probe leaves. Raises ValueError where it is not there."""
    if not path.is_file():
        raise ValueError(f"{path}: is not there yet; start `trace-dist probe` first")
    return path


def read_probed(path: Path, read: Callable[[Path], T]) -> T:
    """A file that the probe leaves, read on every rank. Collective.

    Raises:
        ValueError: on all ranks: it is not there, or one of them cannot read it.
    """
    on_main(lambda: probed_file(path))
    return on_all(lambda: read(present(path)))


def _proxy_mask(cfg: RunConfig, task: str) -> Mask:
    """The proxy's mask of a task, at the density of the run: the probe's own, or, where its density was raced for, made anew.

    Collective.
    """
    made = read_probed(cfg.folder.proxy_mask(task), Mask.load)
    if not made.meta.get("raced"):
        return made
    scores, layouts, _ = read_probed(cfg.folder.saliency(task), load_saliency)
    return mask_from_scores(scores, layouts, cfg.mask.granularity, cfg.mask.share, cfg.mask.spread)


def _transferred(model: ShardedModel, cfg: RunConfig, task: str, refused: Units) -> Mask:
    """The tensors of the target whose counterparts of the proxy score highest; a target that was probed is its own proxy.

    Collective.
    """
    scores, layouts, _ = read_probed(cfg.folder.saliency(task), load_saliency)
    shapes = {name: layout.shape for name, layout in layouts.items()}
    return project_tensors(model, {n: float(score) for n, score in scores.items()}, shapes, cfg.mask, refused)


def _chosen_again(mask: Mask, saliency: Path, refused: Units) -> Mask:
    """A mask of the target itself, or, where something is refused, the next best by the same scores. Collective."""
    if refused:
        scores, _, _ = read_probed(saliency, load_saliency)
        budgets = {name: mask.tensor_density(name) * layout.numel for name, layout in mask.layouts.items()}
        mask = place(mask.layouts, mask.granularity, budgets, lambda name, _: scores[name], refused)
    return replace(mask, meta={"method": PROBED})
