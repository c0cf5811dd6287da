"""Placement align: the proxy's entries at the places of the target that are like them, for siblings of another width.

Both models run on the same prompts (projection/activations.py). Channels of the residual stream are matched first, over all
layers at once; then, layer by layer at the same relative depth, attention heads and the MLP's neurons
(projection/assignment.py). An entry of the target has the score of the proxy's entry at the matched row and column, times what
the two matches are worth.

The proxy must read the target's tokens. Parameters whose dimensions have no names (models/axes.py) go by their magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trace_dist.config.checks import Section
from trace_dist.data.modality import TEXT
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import Scores
from trace_dist.masks.units import UnitLayout
from trace_dist.models.axes import axes_of
from trace_dist.models.heads import head_rows
from trace_dist.models.roles import ParamInfo, describe, role_of
from trace_dist.projection.activations import correlations, passes, places_of
from trace_dist.projection.assignment import Attention, Matched, assigned, match_heads
from trace_dist.projection.matching import entry_scores, unit_means
from trace_dist.projection.placements.magnitude import magnitude_scores
from trace_dist.projection.site import Outline, Shown, Site

label = "the proxy's entries, by alike activations"
needs_scores = needs_module = True
CURE = "name a proxy that shares the target's tokenizer, or choose another placement"
OTHERS_TOKENS = f"projection.placement='align': the proxy does not read the target's tokens; {CURE}"


@dataclass(frozen=True)
class Options(Section):
    """Options of the placement."""

    section: ClassVar[str] = "projection.options"

    batches: int = 4
    """Batches of the task's prompts and answers on which activations are compared."""

    def check(self) -> None:
        self.at_least(1, "batches")


def scores(site: Site, options: Options) -> Scores:
    """Scores of every unit of the target. Collective.

    Raises:
        ValueError: the proxy reads other tokens, or the layers of one of the models are not known well enough.
    """
    alignment = Alignment.of(site, options.batches)
    magnitudes = magnitude_scores(site.model)

    def scores(name: str, layout: UnitLayout) -> Tensor:
        source = alignment.source(name)
        if source is None:
            return magnitudes(name, layout)
        values = entry_scores(source, alignment.shown)
        worth: Tensor | float = 1.0
        for dim, matched in enumerate(alignment.matches(name, layout)):
            if matched is not None:
                values = values.index_select(dim, matched.units)
                view = [-1 if each == dim else 1 for each in range(len(layout.shape))]
                worth = worth * matched.worth.view(view)
        return unit_means((values * worth).expand(layout.shape), layout)

    return scores


def check_models(options: Options, outline: Outline) -> None:
    """Raise ``ValueError`` where the proxy reads other tokens, or the layers of one of the models are not known well enough."""
    if outline.modality != TEXT:
        raise ValueError(
            f"projection.placement='align': compares models that read text, and data.modality is {outline.modality!r}; choose "
            "another placement"
        )
    for module in (outline.target, outline.proxy):
        places_of(module)
    _heads(outline.target, outline.proxy, _pairs(describe(outline.target), describe(outline.proxy)))
    if not outline.same_tokens():
        raise ValueError(OTHERS_TOKENS)


@dataclass(frozen=True)
class Alignment:
    """Which rows and columns of the proxy those of the target are like.

    Attributes:
        shown: of the proxy.
        ours, theirs: parameters of target and proxy.
        pairs: layer of the target -> of the proxy.
        names: (tower's role, layer) of the proxy -> its parameter.
        hidden: the residual stream's channels, by the root of the mean square of their correlations over layers.
        rows: (role, layer of the target) -> rows of query, key and value, columns of the output weight, neurons.
    """

    shown: Shown
    ours: dict[str, ParamInfo]
    theirs: dict[str, ParamInfo]
    pairs: dict[int, int]
    hidden: Matched
    rows: dict[tuple[str, int], Matched]

    @classmethod
    def of(cls, site: Site, num_batches: int) -> Alignment:
        """Run both models and match their units. Collective."""
        shown = site.shown
        if shown is None or shown.module is None:
            raise ValueError(OTHERS_TOKENS)
        ours, theirs = describe(site.model.module), describe(shown.module)
        pairs = _pairs(ours, theirs)
        heads = _heads(site.model.module, shown.module, pairs)
        rows: dict[tuple[str, int], Matched] = {}
        squares = torch.zeros(1)
        for part in passes(site.model.module, shown.module, pairs):
            found = correlations(site.model, shown.module, part, site.batches(), num_batches)
            for (place, layer), correlation in found.items():
                if place == "hidden":
                    squares = squares + correlation.square()
                elif place == "heads":
                    matched = match_heads(correlation, *heads[layer])
                    rows |= {(role, layer): each for role, each in matched.items()}
                else:
                    rows["mlp", layer] = assigned(correlation.abs())
        return cls(shown, ours, theirs, pairs, assigned((squares / len(pairs)).sqrt()), rows)

    def source(self, name: str) -> str | None:
        """The proxy's parameter of the same name at the paired layer; None where its dimensions or it are not known."""
        info = self.ours[name]
        found = name
        if info.layer is not None:
            if info.layer not in self.pairs or None in axes_of(name, len(info.shape)):
                return None
            found = name.replace(f".{info.layer}.", f".{self.pairs[info.layer]}.", 1)
        if found not in self.shown.layouts or len(self.theirs[found].shape) != len(info.shape):
            return None
        # Dimensions without matches, such as the vocabulary, are the same ones.
        sizes = zip(info.shape, self.theirs[found].shape, axes_of(name, len(info.shape)), strict=True)
        return found if all(axis is not None or mine == its for mine, its, axis in sizes) else None

    def matches(self, name: str, layout: UnitLayout) -> list[Matched | None]:
        """Of each dimension of a parameter."""
        info, found = self.ours[name], list[Matched | None]()
        for axis in axes_of(name, len(layout.shape)):
            if axis is None:
                found.append(None)
            elif axis == "hidden":
                found.append(self.hidden)
            elif info.layer is None:
                raise AssertionError(f"{name}: heads or neurons outside the layers")
            else:
                found.append(self.rows[_role(name, axis), info.layer])
        return found


def _role(name: str, axis: str) -> str:
    """Which match of a layer a dimension takes."""
    if axis == "intermediate":
        return "mlp"
    return role_of(name if name.endswith("weight") else f"{name.removesuffix('bias')}weight")


def _pairs(ours: dict[str, ParamInfo], theirs: dict[str, ParamInfo]) -> dict[int, int]:
    """Layer of the target -> the proxy's at its relative depth, of the text models."""
    depths = [
        {info.layer: info.depth for info in infos.values() if info.layer is not None and info.tower == "text"}
        for infos in (ours, theirs)
    ]
    return {
        layer: min(depths[1], key=lambda other: (abs((depths[1][other] or 0.0) - (depth or 0.0)), other))
        for layer, depth in depths[0].items()
    }


def _heads(
    target: nn.Module, proxy: nn.Module, pairs: dict[int, int]
) -> dict[int, tuple[Attention, Attention]]:
    """Layer of the target -> its heads, and those of the proxy's layer."""
    ours, theirs = (_attentions(module, describe(module)) for module in (target, proxy))
    return {layer: (ours(layer), theirs(other)) for layer, other in pairs.items()}


def _attentions(module: Any, infos: dict[str, ParamInfo]) -> Callable[[int], Attention]:
    """Heads of each layer.

    Raises:
        ValueError: a layer has no query, key and value weights of its own, or heads of an unknown size.
    """
    by_role = {
        (info.role, info.layer): info
        for info in infos.values()
        if info.tower == "text" and len(info.shape) == 2
    }

    def of(layer: int) -> Attention:
        found = {}
        for role in ("q", "k", "v"):
            info = by_role.get((role, layer))  # type: ignore[call-overload]
            if info is None:
                raise ValueError(
                    f"projection.placement='align': layer {layer} has no {role} weight of its own; choose another placement"
                )
            found[role] = info, head_rows(module, info) or 1
        (q, rows), (k, _), (_, value_rows) = found["q"], found["k"], found["v"]
        return Attention(q.shape[0] // rows, k.shape[0] // rows, rows, value_rows)

    return of


def matching(site: Site, mask: Mask) -> dict[str, Any]:
    """As that of ``identity``: what was matched by activations, and what by nothing; JSON-ready."""
    shown = site.shown
    if shown is None or shown.module is None:
        raise AssertionError("align: was not checked")
    ours, theirs = describe(site.model.module), describe(shown.module)
    pairs = _pairs(ours, theirs)
    none = Matched(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    alignment = Alignment(shown, ours, theirs, pairs, none, {})
    by: dict[str, dict[str, Any]] = {
        rule: {"tensors": 0, "entries": 0} for rule in ("activations", "nothing")
    }
    for name, layout in site.layouts.items():
        rule = by["nothing" if alignment.source(name) is None else "activations"]
        rule["tensors"] += 1
        rule["entries"] += int(layout.sizes(mask.units[name]).sum()) if name in mask.units else 0
    why = {
        "its dimensions are not known, or the proxy has no such maskable parameter": by["nothing"]["tensors"]
    }
    by["nothing"]["why"] = why if by["nothing"]["tensors"] else {}
    return by | {"layers": {str(layer): [other] for layer, other in pairs.items()}}
