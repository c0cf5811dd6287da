"""What the shapes of a run's models rule out, from their configs alone; before anything is probed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from trace_dist.config import ModelConfig, RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.continual.driver import check_methods
from trace_dist.continual.proxy import same_tokens, stated_origin
from trace_dist.masks.layouts import layouts_for
from trace_dist.masks.units import UnitLayout
from trace_dist.models.architecture import empty_model, read_config
from trace_dist.models.loading import resolve
from trace_dist.parts import PLACEMENTS
from trace_dist.projection.project import needs_proxy, without_counterpart
from trace_dist.projection.site import Outline
from trace_dist.sharding.sequence import check_divisible, check_heads
from trace_dist.stages.probe import needs_probe


def check_masks(cfg: RunConfig) -> None:
    """Whether masks of this granularity and density can be made of the models that are there.

    Raises:
        ValueError: nothing in a model is maskable, its heads have no known size, the density is less than half of a unit, or the
            placement cannot use this proxy for this target.
    """
    models: dict[str, tuple[nn.Module, dict[str, UnitLayout]]] = {}
    for role, model in _masked(cfg):
        what = f"{role}.path={model.path!r}"
        config = read_config(resolve(model.path), what)
        module = empty_model(config, torch.float32, what)
        try:
            layouts = layouts_for(module, cfg.mask.granularity, cfg.mask.block, cfg.mask.maskable)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        density = max(cfg.race.densities) if cfg.mask.density == AUTO else cfg.mask.share
        by_count = cfg.mask.share_of == "tensors"
        total = len(layouts) if by_count else sum(layout.numel for layout in layouts.values())
        smallest = min(each.cols % each.unit if each.ragged else each.unit for each in layouts.values())
        least = 1 if by_count else smallest
        if 2 * density * total < least:
            raise ValueError(
                f"mask.density={cfg.mask.density}: less than half of the smallest unit ({least:,} of {total:,} "
                f"{'tensors' if by_count else 'elements'}) of the {role}, so nothing would train; raise it above "
                f"{least / 2 / total:.1e}, or choose a finer mask.granularity"
            )
        models[role] = module, layouts
    if len(models) == 2 and needs_proxy(cfg.projection):
        _check_pair(cfg, *models["target"], *models["proxy"])


def _check_pair(
    cfg: RunConfig,
    target: nn.Module,
    target_layouts: dict[str, UnitLayout],
    proxy: nn.Module,
    layouts: dict[str, UnitLayout],
) -> None:
    """Whether the run's placement can use this proxy for this target; what of the target the proxy has no like of is said.

    Raises:
        ValueError: it cannot.
    """
    without_counterpart({name: layout.shape for name, layout in layouts.items()}, target, target_layouts)
    name = cfg.projection.placement
    part = PLACEMENTS.load(name)
    # Whole tensors take the proxy's scores, whatever the placement.
    if cfg.mask.granularity != "tensor" and hasattr(part, "check_models"):
        origin, modality = stated_origin(cfg, target, ""), cfg.data.modality
        outline = Outline(target, proxy, target_layouts, layouts, origin, modality, lambda: same_tokens(cfg))
        part.check_models(PLACEMENTS.options(name, cfg.projection.options), outline)


def check_shared_rows(cfg: RunConfig) -> None:
    """Whether as many ranks as ``train.sequence_parallel`` says can share the target's attention heads. Of models that are made
    later only tiny ones are known.

    Raises:
        ValueError: they cannot.
    """
    model, size, field = cfg.target, cfg.train.sequence_parallel, "train.sequence_parallel"
    if not model.made or (Path(model.path) / "config.json").is_file():
        check_divisible(read_config(resolve(model.path), f"target.path={model.path!r}"), size, field)
    elif model.tiny is not None:
        check_heads(model.tiny.num_heads, model.tiny.num_heads, size, field)


def _masked(cfg: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    """The models that get masks, with their roles; those that are made later are not known yet."""
    kinds = [entry.kind for entry in check_methods(cfg)]
    models = [("target", cfg.target)] if any(kind.masked for kind in kinds) else []
    if needs_probe(cfg) and cfg.proxy is not None:
        models.append(("proxy", cfg.proxy))
    for role, model in models:
        if not model.made or (Path(model.path) / "config.json").is_file():
            yield role, model
