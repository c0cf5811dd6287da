"""How many entries each tensor of the large model receives, from the proxy's saliency.

The proxy's mask has a density per tensor. A tensor of the target takes the density that the proxy's tensors of the same role
have at its relative depth (linear interpolation between layers), and all budgets are scaled so that the target's density is
exact. Tensors of one role in one layer (its norms, its biases) count as one. The same model is its own projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trace_dist.masks.mask import Mask
from trace_dist.masks.room import fill
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import ParamInfo

Kind = tuple[str, str, int]
"""Tower, role and number of dimensions: neither an image encoder is matched with the text model nor a bias with a matrix."""


def project_budgets(
    proxy_mask: Mask,
    proxy_infos: Mapping[str, ParamInfo],
    target_layouts: Mapping[str, UnitLayout],
    target_infos: Mapping[str, ParamInfo],
    density: float,
) -> dict[str, float]:
    """Elements to select in each maskable parameter of the target.

    Args:
        proxy_mask: mask of the proxy for one task.
        proxy_infos, target_infos: roles and depths (``models.roles.describe``).
        target_layouts: every maskable parameter of the target.
        density: wanted density of the target's mask.

    Returns:
        name -> number of elements (a float; rounding is left to the selection), summing to ``density`` times the
        maskable elements.
    """
    if _shapes(proxy_mask.layouts) == _shapes(target_layouts):
        shares = {name: proxy_mask.tensor_density(name) for name in target_layouts}
    else:
        curves = _density_curves(proxy_mask, proxy_infos)
        shares = {name: _share(target_infos[name], curves, proxy_mask.density) for name in target_layouts}
    wanted = {name: shares[name] * layout.numel for name, layout in target_layouts.items()}
    return scale_budgets(wanted, target_layouts, density)


def _shapes(layouts: Mapping[str, UnitLayout]) -> dict[str, tuple[int, ...]]:
    return {name: layout.shape for name, layout in layouts.items()}


def _density_curves(mask: Mask, infos: Mapping[str, ParamInfo]) -> dict[Kind, dict[float, float]]:
    """Role -> relative depth -> density of the mask over all tensors there."""
    counts: dict[Kind, dict[float, list[float]]] = {}
    for name, layout in mask.layouts.items():
        point = counts.setdefault(_kind(infos[name]), {}).setdefault(_depth(infos[name]), [0.0, 0.0])
        point[0] += mask.tensor_density(name) * layout.numel
        point[1] += layout.numel
    return {
        kind: {depth: selected / numel for depth, (selected, numel) in sorted(points.items())}
        for kind, points in counts.items()
    }


def _share(info: ParamInfo, curves: Mapping[Kind, Mapping[float, float]], default: float) -> float:
    """Density at a tensor's depth on its role's curve; ``default`` where the proxy has no such role."""
    curve = curves.get(_kind(info))
    return default if curve is None else float(np.interp(_depth(info), list(curve), list(curve.values())))


def _kind(info: ParamInfo) -> Kind:
    return info.tower, info.role, len(info.shape)


def _depth(info: ParamInfo) -> float:
    return 0.0 if info.depth is None else info.depth


def scale_budgets(
    wanted: Mapping[str, float], layouts: Mapping[str, UnitLayout], density: float
) -> dict[str, float]:
    """Scale budgets to a total of ``density`` times all elements, no tensor beyond its size (water-filling)."""
    room = {name: float(layout.numel) for name, layout in layouts.items()}
    return fill(wanted, room, density * sum(room.values()))
