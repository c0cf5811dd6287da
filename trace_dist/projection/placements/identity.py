"""Placement identity: entries of a pruned proxy are entries of its target, and carry their scores with them.

Within the proxy's budgets ([Note: by position] in projection/matching.py):

- in layers that the proxy keeps, the score of an entry is the proxy's own;
- in layers between, it is the score of its residual channel in the kept layers beside it, times what ``between`` says of the
  entry itself, since the rows of a layer that the proxy lacks are unknown;
- entries of channels, heads or neurons that the proxy lacks come last, the largest weights first.

A proxy that is no piece of the target is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trace_dist.config.checks import Section
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import Scores, random_scores, tensor_seed
from trace_dist.masks.units import UnitLayout
from trace_dist.models.origin import Origin
from trace_dist.projection.matching import Match, by_channels, by_position, match, unit_means
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.placements.refine import fisher_scores
from trace_dist.projection.site import Outline, Shown, Site

label = "the proxy's entries, by position"
needs_scores = True
CURE = "name a proxy that is cut out of the target (proxy.prune), or choose another placement"


@dataclass(frozen=True)
class Options(Section):
    """Options of the placement."""

    section: ClassVar[str] = "projection.options"

    between: Literal["magnitude", "fisher", "random"] = "magnitude"
    """What tells entries of one residual channel apart in a layer that the proxy lacks: the size of their weights, their squared
    gradients by one sharded pass on the target, or chance (entries are drawn with odds in proportion to the channel's score)."""


def scores(site: Site, options: Options) -> Scores:
    """Scores of every unit of the target. Collective.

    Raises:
        ValueError: the proxy is no piece of the target, or nothing of it has been matched.
    """
    shown, origin = _checked(site.shown)
    found = _found(shown, origin, site.layouts)
    magnitudes = magnitude_scores(site.model)
    own = _own(site, options, magnitudes)

    def scores(name: str, layout: UnitLayout) -> Tensor:
        how = found[name]
        if how.how == "nothing":
            return magnitudes(name, layout)
        if how.how == "position":
            (source,) = how.sources
            values, known = by_position(source, layout.shape, shown, origin)
            means = unit_means(values, layout)
        else:
            values, known = by_channels(how, layout.shape, shown, origin)
            means = own(name, layout, unit_means(values, layout))
        inside = unit_means(known, layout) > 0
        return means if bool(inside.all()) else _others_last(means, inside, magnitudes(name, layout))

    return scores


def check_models(options: Options, outline: Outline) -> None:
    """Raise ``ValueError`` where the proxy is no piece of the target, or nothing of it is found there."""
    shown, origin = _checked(Shown({}, outline.layouts, outline.origin))
    _found(shown, origin, outline.target_layouts)


def _found(shown: Shown, origin: Origin, layouts: Mapping[str, UnitLayout]) -> dict[str, Match]:
    found = match(shown, origin, layouts)
    if not any(each.sources for each in found.values()):
        reasons = "; ".join(sorted({each.why for each in found.values()}))
        raise ValueError(
            f"projection.placement='identity': nothing of the proxy is found in the target: {reasons}; {CURE}"
        )
    return found


def _checked(shown: Shown | None) -> tuple[Shown, Origin]:
    if shown is None or shown.origin is None:
        raise ValueError(
            f"projection.placement='identity': the proxy does not say which part of the target it is; {CURE}"
        )
    return shown, shown.origin


def _own(site: Site, options: Options, magnitudes: Scores) -> Any:
    """(parameter, layout, scores of its channels) -> scores of its units, in layers between."""
    if options.between == "random":
        # The largest of log(weight) + Gumbel noise are a draw without replacement, with odds in proportion to the weights.
        seed = tensor_seed(site.seed, f"{site.task}/between")

        def drawn(name: str, layout: UnitLayout, channels: Tensor) -> Tensor:
            uniform = random_scores(name, layout, seed).clamp(1e-7, 1 - 1e-7)
            return channels.clamp_min(1e-30).log() - (-uniform.log()).log()

        return drawn
    of_entries = magnitudes
    if options.between == "fisher":
        of_entries = fisher_scores(site.model, site.layouts, site.batches(), site.probe.fisher_batches)
    return lambda name, layout, channels: channels * of_entries(name, layout).cpu()


def _others_last(scores: Tensor, known: Tensor, magnitudes: Tensor) -> Tensor:
    """Scores whose unknown units lie below all known ones, in the order of their magnitudes."""
    below = float(scores[known].min()) - 1 if bool(known.any()) else 0.0
    return torch.where(known, scores, below - 1 + magnitudes / magnitudes.max().clamp_min(1e-30))


def matching(site: Site, mask: Mask) -> dict[str, Any]:
    """What was matched to what: by rule, how many tensors and how many of the mask's entries; which layers show which.

    JSON-ready: ``{"position": {"tensors", "entries"}, "channels": ..., "nothing": {..., "why": {reason: tensors}},
    "layers": {layer of the target: layers of the proxy}}``.
    """
    shown, origin = _checked(site.shown)
    found = match(shown, origin, site.layouts)
    report: dict[str, Any] = {}
    for rule in ("position", "channels", "nothing"):
        names = [name for name, each in found.items() if each.how == rule]
        entries = sum(int(mask.layouts[n].sizes(mask.units[n]).sum()) for n in names if n in mask.units)
        report[rule] = {"tensors": len(names), "entries": entries}
    why = [each.why for each in found.values() if each.why]
    report["nothing"]["why"] = {reason: why.count(reason) for reason in dict.fromkeys(why)}
    report["layers"] = _layers(found, origin)
    return report


def _layers(found: dict[str, Match], origin: Origin) -> dict[str, list[int]]:
    shows: dict[int, set[int]] = {}
    for name, each in found.items():
        layer = origin.layer(name)
        if layer is not None:
            shows.setdefault(layer, set()).update(
                place for source in each.sources if (place := origin.layer(source)) is not None
            )
    return {str(layer): sorted(places) for layer, places in sorted(shows.items())}
