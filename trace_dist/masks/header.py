"""Layouts as the header of a file states them (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_dist.masks.units import UnitLayout
from trace_dist.utils.files import MALFORMED
from trace_dist.utils.sealed import check_version

VERSION = 1


def layouts_header(layouts: Mapping[str, UnitLayout]) -> dict[str, Any]:
    """Layouts as JSON: name -> [shape, elements per unit], and the stride within a unit where it is not 1."""
    return {
        name: [list(layout.shape), layout.unit, *([layout.stride] if layout.stride > 1 else [])]
        for name, layout in layouts.items()
    }


def layouts_from_header(header: Mapping[str, Any], path: Path) -> dict[str, UnitLayout]:
    """Layouts read back. Raises ValueError when the header was written by a newer version or lacks them."""
    check_version(header.get("version"), path, VERSION)
    try:
        return {name: _layout(*layout) for name, layout in header["layouts"].items()}
    except MALFORMED as error:
        raise ValueError(f"{path}: header without valid layouts ({error}); make the file again") from None


def _layout(shape: Any, unit: Any, stride: Any = 1) -> UnitLayout:
    """One layout out of JSON, where numbers may be anything."""
    for number in (*shape, unit, stride):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{number!r:.100} is no size")
    layout = UnitLayout(tuple(shape), unit, stride)
    if layout.numel >= 2**63:
        raise ValueError(f"shape {list(shape)} has more elements than an index can count")
    return layout
