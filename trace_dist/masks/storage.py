"""Mask and saliency files: safetensors with a JSON header (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trace_dist.masks.header import VERSION, layouts_from_header, layouts_header
from trace_dist.masks.units import UnitLayout
from trace_dist.utils.files import load_tensors, save_tensors

Kind = Literal["mask", "saliency"]


def save(
    path: Path,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, UnitLayout],
    fields: Mapping[str, Any],
) -> None:
    """Write one tensor per parameter, and the layouts and fields as the header."""
    about = {"format": f"trace_dist.{kind}", "version": VERSION, "layouts": layouts_header(layouts)}
    save_tensors(path, tensors, {**about, **fields})


def load(
    path: Path, kind: Kind, fields: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, UnitLayout], dict[str, Any]]:
    """Read a file back: tensors, layouts, and the fields asked for.

    Raises:
        ValueError: missing, corrupt, of another kind, or its header lacks something.
    """
    tensors, header = load_tensors(path, kind)
    layouts = layouts_from_header(header, path)
    for name in fields:
        if name not in header:
            raise ValueError(f"{path}: header without {name!r}; make the file again")
    return tensors, layouts, {name: header[name] for name in fields}


def save_saliency(
    path: Path, scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], meta: Mapping[str, Any]
) -> None:
    """Write a saliency map: ``<param>`` -> one fp32 score per unit."""
    save(path, "saliency", scores, layouts, {"meta": dict(meta)})


def load_saliency(path: Path) -> tuple[dict[str, Tensor], dict[str, UnitLayout], dict[str, Any]]:
    """Read a saliency map: scores, layouts, metadata. Raises ValueError as ``load`` does."""
    scores, layouts, fields = load(path, "saliency", ("meta",))
    return scores, layouts, fields["meta"]
