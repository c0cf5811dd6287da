"""Mask and saliency files: safetensors with a JSON header (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trace_dist.masks.format import Mask
from trace_dist.masks.units import UnitLayout
from trace_dist.utils.files import load_tensors, save_tensors

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


def _field(header: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in header:
        raise ValueError(f"{path}: header without {name!r}; make the file again")
    return header[name]


def save_mask(mask: Mask, path: Path) -> None:
    """Write a mask: ``<param>`` -> unit indices."""
    header = {
        "format": "trace_dist.mask",
        "version": VERSION,
        "granularity": mask.granularity,
        "density": mask.density,
        "digest": mask.digest(),
        "layouts": layouts_header(mask.layouts),
        "meta": dict(mask.meta),
    }
    save_tensors(path, mask.units, header)


def load_mask(path: Path) -> Mask:
    """Read a mask.

    Raises:
        ValueError: missing, corrupt, not a mask, or inconsistent.
    """
    tensors, header = load_tensors(path, "mask")
    layouts = layouts_from_header(header, path)
    granularity, digest, meta = (_field(header, name, path) for name in ("granularity", "digest", "meta"))
    try:
        mask = Mask(tensors, layouts, granularity, meta)
    except ValueError as error:
        raise ValueError(f"{path}: corrupt mask file ({error})") from None
    if mask.digest() != digest:
        raise ValueError(
            f"{path}: corrupt mask file (its indices do not match their digest); restore it from a copy or make it again"
        )
    return mask


def save_saliency(
    path: Path, scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], meta: Mapping[str, Any]
) -> None:
    """Write a saliency map: ``<param>`` -> one fp32 score per unit."""
    header = {
        "format": "trace_dist.saliency",
        "version": VERSION,
        "layouts": layouts_header(layouts),
        "meta": dict(meta),
    }
    save_tensors(path, scores, header)


def load_saliency(path: Path) -> tuple[dict[str, Tensor], dict[str, UnitLayout], dict[str, Any]]:
    """Read a saliency map: scores, layouts, metadata. Raises ValueError as ``load_mask`` does."""
    tensors, header = load_tensors(path, "saliency")
    return tensors, layouts_from_header(header, path), _field(header, "meta", path)
