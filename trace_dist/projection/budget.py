"""How many entries each tensor of the large model receives, from the proxy's saliency.

The proxy's mask has a density per tensor. A tensor of the target takes the density that the proxy's tensors of the same role
have at its relative depth (linear interpolation between layers), and all budgets are scaled so that the target's density is
exact. The same model with the same layers is its own projection.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trace_dist.masks.format import Mask
from trace_dist.masks.units import UnitLayout
from trace_dist.models.roles import ParamInfo


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
    by_role: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name in proxy_mask.layouts:
        info = proxy_infos[name]
        by_role.setdefault(_kind(info), []).append((_depth(info), proxy_mask.tensor_density(name)))
    wanted = {}
    for name, layout in target_layouts.items():
        points = sorted(by_role.get(_kind(target_infos[name]), []))
        if points:
            depths, densities = np.array(points).T
            share = float(np.interp(_depth(target_infos[name]), depths, densities))
        else:
            share = proxy_mask.density
        wanted[name] = share * layout.numel
    return scale_budgets(wanted, target_layouts, density)


def _kind(info: ParamInfo) -> tuple[str, int]:
    return info.role, len(info.shape)


def _depth(info: ParamInfo) -> float:
    return 0.0 if info.depth is None else info.depth


def scale_budgets(
    wanted: Mapping[str, float], layouts: Mapping[str, UnitLayout], density: float
) -> dict[str, float]:
    """Scale budgets to a total of ``density`` times all elements, no tensor beyond its size (water-filling)."""
    total = density * sum(layout.numel for layout in layouts.values())
    if sum(wanted.values()) <= 0:
        wanted = {name: float(layout.numel) for name, layout in layouts.items()}
    full: set[str] = set()
    while True:
        free = sum(amount for name, amount in wanted.items() if name not in full)
        room = total - sum(layouts[name].numel for name in full)
        if free <= 0:
            # Only tensors without any share are left: they take what remains evenly.
            rest = sum(layouts[name].numel for name in layouts if name not in full)
            return {
                n: float(la.numel) if n in full else la.numel * max(room, 0) / max(rest, 1)
                for n, la in layouts.items()
            }
        factor = room / free
        over = {n for n in wanted if n not in full and wanted[n] * factor > layouts[n].numel * (1 + 1e-9)}
        if not over:
            return {n: float(layouts[n].numel) if n in full else wanted[n] * factor for n in layouts}
        full |= over
