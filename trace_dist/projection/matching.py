"""Which part of a pruned copy shows what of its target: by position, by the residual stream's channels, or not at all.

[Note: by position] A pruned copy is a piece of its target. A parameter of a layer that it keeps is the target's own, so each of
its entries has a score of the copy. A parameter of a layer between has none; but it shares the residual channels of its
neighbours: the columns of query, key, value, gate and up, the rows of the output and down weights. A channel's score is the root
of the mean of the squared scores at it, in the same parameter of the kept layers below and above, weighted by how near they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trace_dist.masks.unit_sums import add_at
from trace_dist.masks.units import UnitLayout
from trace_dist.models.axes import axes_of
from trace_dist.models.origin import Origin
from trace_dist.projection.site import Shown

How = Literal["position", "channels", "nothing"]


@dataclass(frozen=True)
class Match:
    """What shows a parameter of the target.

    Attributes:
        how: by which rule.
        sources: parameter of the copy -> weight; one of weight 1 by position.
        why: why nothing does.
    """

    how: How
    sources: Mapping[str, float]
    why: str = ""


def match(shown: Shown, origin: Origin, layouts: Mapping[str, UnitLayout]) -> dict[str, Match]:
    """Parameter of the target -> what shows it."""
    return {name: _match(name, layout, shown, origin) for name, layout in layouts.items()}


def _match(name: str, layout: UnitLayout, shown: Shown, origin: Origin) -> Match:
    layer, kept = origin.layer(name), list(origin.layers)
    if layer is None or layer in kept:
        source = name if layer is None else origin.moved(name, kept.index(layer))
        if source not in shown.layouts:
            return Match("nothing", {}, "the proxy has no such maskable parameter")
        fits = _fits(source, layout, shown, origin)
        return Match("position", {source: 1.0}) if fits else Match("nothing", {}, "its shape is another one")
    if "hidden" not in axes_of(name, len(layout.shape)):
        return Match("nothing", {}, "it shares no channels with other layers")
    below, above = (
        [place for place in range(len(kept)) if (kept[place] < layer) == lower] for lower in (True, False)
    )
    places = [*below[-1:], *above[:1]]
    sources = {origin.moved(name, place): abs(kept[place] - layer) for place in places}
    sources = {
        source: distance
        for source, distance in sources.items()
        if source in shown.layouts and _channels_fit(source, layout, shown, origin)
    }
    if not sources:
        return Match("nothing", {}, "no kept layer beside it has such a parameter")
    near = sum(1 / distance for distance in sources.values())
    return Match("channels", {source: 1 / distance / near for source, distance in sources.items()})


def _fits(source: str, layout: UnitLayout, shown: Shown, origin: Origin) -> bool:
    """Whether every dimension of the copy's parameter is that of the target's, or a part of it."""
    shape = shown.layouts[source].shape
    if len(shape) != len(layout.shape):
        return False
    places = origin.places(source, shape)
    return all(
        size == whole if each is None else int(each.max()) < whole
        for size, whole, each in zip(shape, layout.shape, places, strict=True)
    )


def _channels_fit(source: str, layout: UnitLayout, shown: Shown, origin: Origin) -> bool:
    shape = shown.layouts[source].shape
    if len(shape) != len(layout.shape):
        return False
    dim = axes_of(source, len(shape)).index("hidden")
    places = origin.places(source, shape)[dim]
    return shape[dim] == layout.shape[dim] if places is None else int(places.max()) < layout.shape[dim]


def by_position(source: str, shape: tuple[int, ...], shown: Shown, origin: Origin) -> tuple[Tensor, Tensor]:
    """Scores of the entries of one parameter of a kept layer, and which of them the copy has.

    Returns:
        [*shape] fp32, 0 where there is none; [*shape] bool.
    """
    values = entry_scores(source, shown)
    scores, known = values, torch.ones_like(values, dtype=torch.bool)
    places = origin.places(source, values.shape)
    # The last dimension first, so that the others keep the copy's size until it is their turn.
    for dim, each in reversed(list(enumerate(places))):
        if each is not None:
            size = (*scores.shape[:dim], shape[dim], *scores.shape[dim + 1 :])
            scores = torch.zeros(size).index_copy_(dim, each, scores)
            known = torch.zeros(size, dtype=torch.bool).index_copy_(dim, each, known)
    return scores, known


def by_channels(found: Match, shape: tuple[int, ...], shown: Shown, origin: Origin) -> tuple[Tensor, Tensor]:
    """Scores of the residual channels at the entries of one parameter between, and where they are known; as ``by_position``."""
    channels, known, dim = torch.tensor(0.0), torch.tensor(False), 0
    for source, weight in found.sources.items():
        values = entry_scores(source, shown)
        dim = axes_of(source, values.dim()).index("hidden")
        others = [each for each in range(values.dim()) if each != dim]
        scores = values.square().mean(others).sqrt() if others else values
        have = torch.ones(len(scores), dtype=torch.bool)
        places = origin.places(source, values.shape)[dim]
        if places is not None:
            scores = torch.zeros(shape[dim]).index_copy_(0, places, scores)
            have = torch.zeros(shape[dim], dtype=torch.bool).index_copy_(0, places, have)
        channels, known = channels + weight * scores, known | have
    view = [size if each == dim else 1 for each, size in enumerate(shape)]
    return channels.view(view).expand(shape), known.view(view).expand(shape)


def entry_scores(source: str, shown: Shown) -> Tensor:
    """The score of each entry of a parameter of the copy: that of its unit; fp32."""
    layout, scores = shown.layouts[source], shown.scores[source].float()
    if layout.unit > 1:
        scores = scores[layout.unit_of(torch.arange(layout.numel))]
    return scores.view(layout.shape)


def unit_means(values: Tensor, layout: UnitLayout) -> Tensor:
    """Mean of an entry-wise quantity over each unit: [num_units] fp32."""
    if layout.unit == 1:
        return values.reshape(-1).float()
    units = layout.unit_of(torch.arange(layout.numel))
    sums = torch.zeros(layout.num_units, dtype=torch.float64)
    add_at(sums, units, values.reshape(-1).double())
    return (sums / layout.sizes(torch.arange(layout.num_units))).float()
