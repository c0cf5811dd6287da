"""How many entries each tensor of the large model receives, from the proxy's saliency.

The proxy's mask has a density per tensor. A tensor of the target takes the density that the proxy's tensors of the same role
have at its relative depth (linear interpolation between layers), and all budgets are scaled so that the target's density is
exact. Tensors of one role in one layer (its norms, its biases) count as one. The same model is its own projection.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    return {name: _at(target_infos[name], curves, default) for name in names}


def _curves(values: Mapping[str, float], infos: Mapping[str, ParamInfo]) -> dict[Kind, dict[float, float]]:
    """Role -> relative depth -> mean over the elements of all tensors there."""
    sums: dict[Kind, dict[float, list[float]]] = {}
    for name, value in values.items():
        point = sums.setdefault(_kind(infos[name]), {}).setdefault(_depth(infos[name]), [0.0, 0.0])
        numel = prod(infos[name].shape)
        point[0] += value * numel
        point[1] += numel
    return {
        kind: {depth: total / numel for depth, (total, numel) in sorted(points.items())}
        for kind, points in sums.items()
    }


def _at(info: ParamInfo, curves: Mapping[Kind, Mapping[float, float]], default: float) -> float:
    """The value at a tensor's depth on its role's curve; ``default`` where the proxy has no such role."""
    curve = curves.get(_kind(info))
    return default if curve is None else float(np.interp(_depth(info), list(curve), list(curve.values())))


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
