"""Checkpoints of masked training: only what the mask holds, loadable on any number of ranks.

Beside the random state, a rank's file has ``<param>/values`` and AdamW's moments at this rank's entries (``optim.pieces``), and,
where they were given, ``<param>/best``: values of an earlier step.
The base model is referenced by its fingerprint, never copied. On the same number of ranks a resumed run repeats the uninterrupted
one bit for bit, dropout included; on another number the random state starts anew, and 8-bit moments are coded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from trace_kernels.masked_adamw_8bit import BLOCK_SIZE

from trace_dist.checkpoint.format import (
    BEST,
    MANIFEST,
    MASK,
    damaged,
    is_count,
    is_map,
    open_files,
    read_checked,
)
from trace_dist.checkpoint.random_state import check_random_state, restore_random_state
from trace_dist.checkpoint.retention import KEEP, newest_manifest
from trace_dist.checkpoint.writer import Contents, FileBeside, Write, write_checkpoint
from trace_dist.masks.mask import Mask
from trace_dist.models.fingerprint import same_model
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.optim.pieces import Piece, covers, join, pieces_of, restore
from trace_dist.optim.states import MOMENTS, State, tensors_of
from trace_dist.sharding.support import Support
from trace_dist.utils.together import on_all


def save_checkpoint(
    root: Path,
    step: int,
    optimizer: MaskedAdamW,
    state: dict[str, Any],
    keep: int = KEEP,
    best: Mapping[str, Tensor] | None = None,
    write: Write = write_checkpoint,
) -> Path:
    """Write a checkpoint and drop older ones. Collective.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done.
        optimizer: its values and moments are written.
        state: JSON-ready state of everything else (schedule, data position).
        keep: checkpoints that stay in ``root``, this one among them.
        best: parameter -> values of this rank's entries at an earlier step, to be kept beside the present ones.
        write: what writes: at once, or ``Background.save``.

    Raises:
        ValueError: a value is not finite, or the disk has no room; the older checkpoints are then still there.
    """
    mask = optimizer.mask
    tensors: dict[str, Tensor] = {}
    intervals: dict[str, list[int]] = {}
    for support, entries in optimizer.compact():
        intervals[support.name] = [support.offset, support.offset + support.runs.num_entries]
        parts = _parts(optimizer, support, entries)
        if best is not None:
            parts[BEST] = best[support.name]
        tensors |= {f"{support.name}/{part}": tensor for part, tensor in parts.items()}
    facts = {
        "mask_digest": mask.digest(),
        "model": mask.meta.get("model"),
        "param_steps": {support.name: entries["step"] for support, entries in optimizer.compact()},
        **({} if best is None else {BEST: True}),
    }
    num_bytes = sum(gaps.num_units * gaps.dtype.itemsize for gaps in mask.units.gaps.values())
    contents = Contents("masked", tensors, intervals, facts, (FileBeside(MASK, num_bytes, mask.save),))
    return write(root, step, contents, state, keep)


def _parts(optimizer: MaskedAdamW, support: Support, state: State) -> dict[str, Tensor]:
    """What is kept of one parameter's entries."""
    moments = {part: tensor for part, tensor in tensors_of(state).items() if part != "master"}
    return {"values": optimizer.values(support), **moments}


def load_mask(folder: Path) -> Mask:
    """The mask of a checkpoint."""
    return Mask.load(folder / MASK)


def check_mask(root: Path, mask: Mask) -> None:
    """Raise ValueError where a training on a mask would go on from a checkpoint of another one. On one rank, before long work."""
    if (found := newest_manifest(root)) is not None:
        _check_mask(*found, mask)


def _check_mask(folder: Path, manifest: Mapping[str, Any], mask: Mask) -> None:
    if not mask.has_digest(manifest.get("mask_digest")):
        raise ValueError(
            f"{folder}: the checkpoint is of another mask; resume with {folder / MASK}, or delete {folder.parent} to begin anew"
        )


def load_checkpoint(folder: Path, optimizer: MaskedAdamW) -> dict[str, Any]:
    """Restore values, moments and weights on any number of ranks, and the random state on the same number. Collective.

    Returns:
        The manifest; ``manifest["state"]`` is what ``save_checkpoint`` was given, ``manifest["step"]`` the steps done.

    Raises:
        ValueError: not a checkpoint, another mask, another base model, or a damaged file; nothing has been loaded then.
    """
    manifest = read_checked(folder, "masked")
    files = open_files(folder, (name for name in manifest["files"] if name != MASK))
    found = on_all(lambda: _locate(folder, manifest, optimizer, files))
    on_all(lambda: check_random_state(folder, files))
    values = restore(optimizer.compact(), found, manifest["param_steps"])
    optimizer.set_values(values)
    restore_random_state(files)
    return manifest


def load_best(folder: Path, manifest: dict[str, Any], optimizer: MaskedAdamW) -> dict[str, Tensor] | None:
    """The values that ``save_checkpoint`` was given as ``best``, this rank's; None where it was given none. Collective.

    Args:
        folder: the checkpoint.
        manifest: what ``load_checkpoint`` gave, which has checked the files.
        optimizer: that it was loaded into.
    """
    if not manifest.get(BEST):
        return None
    files = open_files(folder, (name for name in manifest["files"] if name != MASK))
    found = on_all(lambda: _locate(folder, manifest, optimizer, files))
    return {support.name: join(support, found[support.name], BEST) for support in optimizer.supports}


def _locate(
    folder: Path, manifest: dict[str, Any], optimizer: MaskedAdamW, files: dict[str, Any]
) -> dict[str, list[Piece]]:
    """Where each parameter's entries lie; raises ValueError where the checkpoint is of something else."""
    steps, kept_model = manifest.get("param_steps"), manifest.get("model")
    if not isinstance(kept_model, str | None) or not isinstance(steps, dict) or not is_map(steps, is_count):
        raise damaged(folder / MANIFEST)
    _check_mask(folder, manifest, optimizer.mask)
    model = optimizer.mask.meta.get("model")
    if model is not None and kept_model is not None and not same_model(str(model), kept_model):
        raise ValueError(
            f"{folder}: the checkpoint is of model {kept_model}, but the mask of {model}; use the mask of that model"
        )
    opened = [(file, manifest["files"][name]["intervals"]) for name, file in files.items()]
    parts = ("values", *MOMENTS, *([BEST] if manifest.get(BEST) else []))
    found = {support.name: pieces_of(support, opened) for support in optimizer.supports}
    for support in optimizer.supports:
        pieces = found[support.name]
        if (
            support.name not in steps
            or not covers(support, pieces)
            or not all(_fits(piece, parts) for piece in pieces)
        ):
            raise damaged(folder / MANIFEST)
    return found


def _fits(piece: Piece, parts: Iterable[str]) -> bool:
    """Whether a file holds as much of a piece as the manifest says."""
    sizes = {f"{piece.name}/{part}": piece.length for part in parts}
    keys = piece.file.keys()
    scales = {f"{name}_absmax": -(-size // BLOCK_SIZE) for name, size in sizes.items()}
    sizes |= {name: size for name, size in scales.items() if name in keys}
    return all(
        name in keys and piece.file.get_slice(name).get_shape() == [size] for name, size in sizes.items()
    )
