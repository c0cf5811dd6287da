"""Mask and saliency files: safetensors with a JSON header (docs/formats.md), which has a checksum of its own.

A mask's digest stands for its indices. The scores of a saliency map have a checksum. Files of earlier releases have neither
checksum and are read as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from trace_dist.masks.header import VERSION, layouts_from_header, layouts_header
from trace_dist.masks.units import UnitLayout
from trace_dist.utils.files import corrupt, load_tensors, save_tensors
from trace_dist.utils.sealed import load_sealed, save_sealed, sealed_header

Kind = Literal["mask", "saliency"]
FIELDS: dict[str, type] = {"granularity": str, "digest": str, "meta": dict}
"""What a header may have beside the layouts."""


def save(
    path: Path,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, UnitLayout],
    fields: Mapping[str, Any],
) -> None:
    """Write one tensor per parameter, and the layouts and fields as the header."""
    about = {"format": f"trace_dist.{kind}", "version": VERSION, "layouts": layouts_header(layouts)}
    header = {**about, **fields}
    if kind == "mask":
        save_tensors(path, tensors, sealed_header(header))
    else:
        save_sealed(path, tensors, header)


def load(
    path: Path, kind: Kind, fields: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, UnitLayout], dict[str, Any]]:
    """Read a file back: tensors, layouts, and the header, which has the fields asked for.

    Raises:
        ValueError: missing, corrupt, of another kind, or its header lacks something.
    """
    tensors, header = load_tensors(path, kind) if kind == "mask" else load_sealed(path, kind, bare=True)
    layouts = layouts_from_header(header, path)
    for name in fields:
        if not isinstance(header.get(name), FIELDS[name]):
            raise ValueError(f"{path}: header without {name!r}; make the file again")
    return tensors, layouts, header


def save_saliency(
    path: Path, scores: Mapping[str, Tensor], layouts: Mapping[str, UnitLayout], meta: Mapping[str, Any]
) -> None:
    """Write a saliency map: ``<param>`` -> one fp32 score per unit."""
    save(path, "saliency", scores, layouts, {"meta": dict(meta)})


def load_saliency(path: Path) -> tuple[dict[str, Tensor], dict[str, UnitLayout], dict[str, Any]]:
    """Read a saliency map: scores, layouts, metadata. Raises ValueError as ``load`` does."""
    scores, layouts, header = load(path, "saliency", ("meta",))
    if scores.keys() != layouts.keys():
        raise corrupt(path, "saliency", "its scores are not of its layouts")
    for name, score in scores.items():
        if score.shape != (layouts[name].num_units,) or not score.is_floating_point():
            raise corrupt(path, "saliency", f"the scores of {name!r} do not fit its layout")
    return scores, layouts, header["meta"]
