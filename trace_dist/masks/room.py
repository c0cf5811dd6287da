"""The room that is left in a model where some of its units are refused, and budgets that fit into it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trace_dist.masks.units import UnitLayout


def free_elements(layouts: Mapping[str, UnitLayout], refused: Mapping[str, Tensor]) -> dict[str, int]:
    """Elements of each parameter that are outside the refused units."""
    return {
        name: layout.numel - (int(layout.sizes(refused[name]).sum()) if name in refused else 0)
        for name, layout in layouts.items()
    }


def fit(
    budgets: Mapping[str, float], layouts: Mapping[str, UnitLayout], refused: Mapping[str, Tensor]
) -> dict[str, float]:
    """Budgets within the room that is left: what does not fit into one tensor goes to the others.

    Args:
        budgets: elements per parameter.
        layouts: every maskable parameter.
        refused: parameter -> units that may not be taken.

    Returns:
        name -> elements, at most what is free there; their sum is that of ``budgets``, or all the room where that is less.
    """
    room = free_elements(layouts, refused)
    wanted = {name: float(budgets.get(name, 0.0)) for name in layouts}
    if all(wanted[name] <= room[name] for name in layouts):
        return wanted
    return fill(wanted, room, min(sum(wanted.values()), sum(room.values())))


def fill(wanted: Mapping[str, float], room: Mapping[str, float], total: float) -> dict[str, float]:
    """Scale amounts to a total, none beyond its room (water-filling)."""
    if sum(wanted.values()) <= 0:
        wanted = {name: float(amount) for name, amount in room.items()}
    full: set[str] = set()
    while True:
        free = sum(amount for name, amount in wanted.items() if name not in full)
        left = total - sum(room[name] for name in full)
        if free <= 0:
            # Only those without any share are left: they take what remains evenly.
            rest = sum(room[name] for name in room if name not in full)
            return {
                name: float(amount) if name in full else amount * max(left, 0) / max(rest, 1)
                for name, amount in room.items()
            }
        factor = left / free
        over = {n for n in wanted if n not in full and wanted[n] * factor > room[n] * (1 + 1e-9)}
        if not over:
            return {n: float(room[n]) if n in full else wanted[n] * factor for n in room}
        full |= over
