"""How many entries each tensor of the large model receives, from the proxy's saliency.

The proxy's mask has a density per tensor. A tensor of the target takes the density that the proxy's tensors of the same role
have at its relative depth (linear interpolation between layers), and all budgets are scaled so that the target's density is
exact. Tensors of one role in one layer (its norms, its biases) count as one. The same model is its own projection. In a family
that fuses what the other keeps apart (query, key and value; gate and up; experts), roles are those of what is fused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np

from trace_dist.config.mask import FREE, Spread
from trace_dist.masks.mask import Mask
from trace_dist.masks.room import fill
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import ParamInfo

Kind = tuple[str, str, int, bool]
"""Tower, role, number of dimensions, and whether it lies in a layer: neither an image encoder is matched with the text model nor
a bias with a matrix nor the last norm with those of the first layer."""
Curve = dict[float, tuple[float, int]]
"""Relative depth -> sum over the elements of all tensors there, and their number."""
_RELATED: Mapping[str, Sequence[tuple[str, ...]]] = {
    **dict.fromkeys(("q", "k", "v"), (("qkv",),)),
    "qkv": (("q", "k", "v"),),
    "gate": (("gate_up",), ("up",)),
    "up": (("gate_up",),),
    "gate_up": (("gate", "up"),),
}
"""Role -> roles that do its work in other families, the nearest first; of several, the mean over their elements counts."""
_OTHER_DIMS = {2: 3, 3: 2}
"""Experts fused in one parameter [num_experts, ...] do the work of a matrix."""
_ALIKE = ("other", "norm", "bias")
"""Roles whose tensors are alike only where they have as many dimensions."""


def project_budgets(
    proxy_mask: Mask,
    proxy_infos: Mapping[str, ParamInfo],
    target_layouts: Mapping[str, UnitLayout],
    target_infos: Mapping[str, ParamInfo],
    density: float,
    spread: Spread = FREE,
) -> dict[str, float]:
    """Elements to select in each maskable parameter of the target.

    Args:
        proxy_mask: mask of the proxy for one task.
        proxy_infos, target_infos: roles and depths (``models.roles.describe``).
        target_layouts: every maskable parameter of the target.
        density: wanted density of the target's mask.
        spread: least and greatest density of a tensor.

    Returns:
        name -> number of elements (a float; rounding is left to the selection), summing to ``density`` times the
        maskable elements.
    """
    densities = {name: proxy_mask.tensor_density(name) for name in proxy_mask.layouts}
    shares = carry_over(densities, proxy_infos, target_infos, target_layouts, proxy_mask.density)
    wanted = {name: shares[name] * layout.numel for name, layout in target_layouts.items()}
    return scale_budgets(wanted, target_layouts, density, spread)


def carry_over(
    values: Mapping[str, float],
    proxy_infos: Mapping[str, ParamInfo],
    target_infos: Mapping[str, ParamInfo],
    names: Collection[str],
    default: float,
) -> dict[str, float]:
    """A number for each tensor of the target, from one for each tensor of the proxy: by role and relative depth.

    Args:
        values: of the proxy's tensors.
        proxy_infos, target_infos: roles, depths and shapes.
        names: tensors of the target.
        default: where the proxy has no such role.
    """
    if {name: proxy_infos[name].shape for name in values} == {
        name: target_infos[name].shape for name in names
    }:
        return dict(values)
    curves = _curves(values, proxy_infos)
    found = {kind: _curve(kind, curves) for kind in {_kind(target_infos[name]) for name in names}}
    return {name: _at(target_infos[name], found[_kind(target_infos[name])], default) for name in names}


def unmatched(
    proxy_infos: Mapping[str, ParamInfo],
    target_infos: Mapping[str, ParamInfo],
    target_layouts: Mapping[str, UnitLayout],
) -> dict[str, float]:
    """Role -> share of the target's maskable elements whose tensors are like none of the proxy's, so that ``carry_over`` gives
    them the default.

    Args:
        proxy_infos: of the proxy's maskable tensors.
        target_infos: roles and shapes.
        target_layouts: every maskable parameter of the target.
    """
    curves = _curves(dict.fromkeys(proxy_infos, 0.0), proxy_infos)
    total = sum(layout.numel for layout in target_layouts.values())
    found: dict[str, float] = {}
    for name, layout in target_layouts.items():
        info = target_infos[name]
        if not _curve(_kind(info), curves):
            found[info.role] = found.get(info.role, 0.0) + layout.numel / total
    return found


def _curves(values: Mapping[str, float], infos: Mapping[str, ParamInfo]) -> dict[Kind, Curve]:
    curves: dict[Kind, Curve] = {}
    for name, value in values.items():
        curve, depth, numel = (
            curves.setdefault(_kind(infos[name]), {}),
            _depth(infos[name]),
            prod(infos[name].shape),
        )
        total, count = curve.get(depth, (0.0, 0))
        curve[depth] = total + value * numel, count + numel
    return curves


def _curve(kind: Kind, curves: Mapping[Kind, Curve]) -> Curve:
    """Of the proxy's tensors that are most like those of a kind; empty where none is."""
    tower, role, num_dims, in_layer = kind
    dims = [num_dims] if role in _ALIKE else [num_dims, _OTHER_DIMS.get(num_dims, num_dims)]
    for roles in [(role,), *_RELATED.get(role, ())]:
        for num in dims:
            found = [curves[each] for part in roles if (each := (tower, part, num, in_layer)) in curves]
            if found:
                return _merged(found)
    return {}


def _merged(curves: Sequence[Curve]) -> Curve:
    merged: Curve = {}
    for curve in curves:
        for depth, (total, count) in curve.items():
            before, others = merged.get(depth, (0.0, 0))
            merged[depth] = before + total, others + count
    return merged


def _at(info: ParamInfo, curve: Curve, default: float) -> float:
    """The mean at a tensor's depth on a curve; ``default`` where that is empty."""
    if not curve:
        return default
    depths = sorted(curve)
    return float(np.interp(_depth(info), depths, [curve[depth][0] / curve[depth][1] for depth in depths]))


def _kind(info: ParamInfo) -> Kind:
    return info.tower, info.role, len(info.shape), info.layer is not None


def _depth(info: ParamInfo) -> float:
    return 0.0 if info.depth is None else info.depth


def scale_budgets(
    wanted: Mapping[str, float], layouts: Mapping[str, UnitLayout], density: float, spread: Spread = FREE
) -> dict[str, float]:
    """Scale budgets to a total of ``density`` times all elements, none beyond its tensor's floor and cap (water-filling)."""
    total = density * sum(layout.numel for layout in layouts.values())
    room = {name: spread.cap * layout.numel for name, layout in layouts.items()}
    least = {name: spread.floor * layout.numel for name, layout in layouts.items()}
    budgets = fill(wanted, room, total)
    low: dict[str, float] = {}
    while under := {n: least[n] for n in layouts if n not in low and budgets[n] < least[n] * (1 - 1e-9)}:
        low |= under
        rest = [name for name in layouts if name not in low]
        left = total - sum(low.values())
        budgets = low | fill({n: wanted[n] for n in rest}, {n: room[n] for n in rest}, left)
    return {name: budgets[name] for name in layouts}
