"""Layouts as the header of a file states them (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_dist.masks.units import UnitLayout

VERSION = 1


def layouts_header(layouts: Mapping[str, UnitLayout]) -> dict[str, Any]:
    """Layouts as JSON: name -> [shape, elements per unit], and the stride within a unit where it is not 1."""
    return {
        name: [list(layout.shape), layout.unit, *([layout.stride] if layout.stride > 1 else [])]
        for name, layout in layouts.items()
    }


def layouts_from_header(header: Mapping[str, Any], path: Path) -> dict[str, UnitLayout]:
    """Layouts read back. Raises ValueError when the header was written by a newer version or lacks them."""
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {header.get('version')!r}, but this release reads {VERSION}; update trace_dist"
        )
    try:
        return {
            name: UnitLayout(tuple(shape), unit, *stride)
            for name, (shape, unit, *stride) in header["layouts"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: header without valid layouts ({error}); make the file again") from None
