"""Checkpoints of masked training: only what the mask holds, loadable on any number of ranks.

A checkpoint is a folder::

    step-00000100/rank-00000.safetensors    <param>/values and AdamW's moments at this rank's entries; random state
    step-00000100/mask.safetensors          the mask (global indices)
    step-00000100/manifest.json             intervals, checksums, schedule and data position; written last

A rank's support is a contiguous slice of the mask's sorted entries, so each file states one interval [start, stop) per parameter,
and any other partition reads the slices that it needs. The base model is referenced by its fingerprint, never copied.
The folder appears under its final name only when it is whole. On the same number of ranks a resumed run repeats the uninterrupted
one bit for bit, dropout included; on another number the random state starts anew, and 8-bit moments are coded again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from trace_kernels.masked_adamw_8bit import BLOCK_SIZE, Blockwise, dequantize_blockwise

from trace_dist.masks.format import Mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.optim.states import MOMENTS, SIGNED, State, is_quantized, set_moment, tensors_of
from trace_dist.sharding.support import Support
from trace_dist.utils import dist
from trace_dist.utils.files import check_free_space, read_json, save_tensors, sha256, write_json

VERSION = 2
MANIFEST = "manifest.json"


def save_checkpoint(root: Path, step: int, optimizer: MaskedAdamW, state: dict[str, Any]) -> Path:
    """Write a checkpoint and drop older ones. Collective.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done.
        optimizer: its values and moments are written.
        state: JSON-ready state of everything else (schedule, data position).

    Raises:
        ValueError: the disk has no room; the older checkpoint is then still there.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".{final.name}.partial"
    _check_room(root, optimizer)
    if dist.is_main():
        for abandoned in root.glob(".step-*.partial"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        optimizer.mask.save(partial / "mask.safetensors")
    dist.barrier()
    name = _rank_file()
    intervals = _save_rank(partial / name, optimizer)
    files = dist.gather_objects((name, sha256(partial / name), intervals))
    if dist.is_main():
        manifest = {
            "format": "trace_dist.checkpoint",
            "version": VERSION,
            "step": step,
            "mask_digest": optimizer.mask.digest(),
            "model": optimizer.mask.meta.get("model"),
            "files": {file: {"sha256": digest, "intervals": spans} for file, digest, spans in files},
            "param_steps": {support.name: state["step"] for support, state in optimizer.compact()},
            "state": state,
        }
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in root.glob("step-*"):  # a later step can be here too: what was left of a damaged checkpoint
            if old != final:
                shutil.rmtree(old)
    dist.barrier()
    return final


def _check_room(root: Path, optimizer: MaskedAdamW) -> None:
    """Raise ValueError on every rank, before anything is written, when a disk cannot take what all ranks write."""
    mine = sum(
        t.nbytes for support, state in optimizer.compact() for t in _parts(optimizer, support, state).values()
    )
    mask = sum(gaps.num_units * gaps.dtype.itemsize for gaps in optimizer.mask.units.gaps.values())
    overhead = 2**20 * (dist.world_size() + 1)  # headers
    needed = sum(dist.gather_objects(mine)) + mask + overhead
    problem = None
    try:
        check_free_space(root, needed)
    except ValueError as error:
        problem = str(error)
    for found in dist.gather_objects(problem):
        if found is not None:
            raise ValueError(found)


def _save_rank(path: Path, optimizer: MaskedAdamW) -> dict[str, list[int]]:
    tensors = _random_state()
    intervals = {}
    for support, state in optimizer.compact():
        intervals[support.name] = [support.offset, support.offset + support.runs.num_entries]
        parts = _parts(optimizer, support, state)
        tensors |= {f"{support.name}/{part}": tensor for part, tensor in parts.items()}
    save_tensors(path, tensors, {"format": "trace_dist.checkpoint"})
    return intervals


def _random_state() -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def _parts(optimizer: MaskedAdamW, support: Support, state: State) -> dict[str, Tensor]:
    """What is kept of one parameter's entries."""
    moments = {part: tensor for part, tensor in tensors_of(state).items() if part != "master"}
    return {"values": optimizer.values(support), **moments}


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max((path for path in root.glob("step-*") if (path / MANIFEST).is_file()), default=None)


def load_mask(folder: Path) -> Mask:
    """The mask of a checkpoint."""
    return Mask.load(folder / "mask.safetensors")


def load_checkpoint(folder: Path, optimizer: MaskedAdamW) -> dict[str, Any]:
    """Restore values, moments and weights on any number of ranks, and the random state on the same number. Collective.

    Returns:
        The manifest; ``manifest["state"]`` is what ``save_checkpoint`` was given.

    Raises:
        ValueError: not a checkpoint, another mask, another base model, or a damaged file.
    """
    manifest = read_json(folder / MANIFEST)
    about = manifest if isinstance(manifest, dict) else {}
    if about.get("format") != "trace_dist.checkpoint" or about.get("version") != VERSION:
        raise ValueError(f"{folder}: not a version {VERSION} trace_dist checkpoint; give the right folder")
    if manifest["mask_digest"] != optimizer.mask.digest():
        raise ValueError(
            f"{folder}: the checkpoint is of another mask; resume with {folder / 'mask.safetensors'}"
        )
    model = optimizer.mask.meta.get("model")
    if None not in (model, manifest["model"]) and model != manifest["model"]:
        raise ValueError(
            f"{folder}: the checkpoint is of model {manifest['model']}, but the mask of {model}; use the mask of that model"
        )
    _check_files(folder, manifest["files"])
    opened = {name: safe_open(str(folder / name), framework="pt") for name in manifest["files"]}
    values = []
    for support, state in optimizer.compact():
        state["step"] = manifest["param_steps"][support.name]
        pieces = _pieces(
            support, {name: (opened[name], manifest["files"][name]["intervals"]) for name in opened}
        )
        values.append(_join(support, pieces, "values"))
        for moment in MOMENTS:
            if not _copy_exactly(support, state, moment, pieces):
                set_moment(state, moment, _join(support, pieces, moment))
    optimizer.set_values(values)
    if len(opened) == dist.world_size():
        mine = opened[_rank_file()]
        torch.set_rng_state(mine.get_tensor("random/cpu"))
        if torch.cuda.is_available() and "random/cuda" in mine.keys():  # noqa: SIM118 - not a mapping
            torch.cuda.set_rng_state(mine.get_tensor("random/cuda"))
    return manifest


@dataclass(frozen=True)
class _Piece:
    """Entries [first + low, first + high) of a support in one rank's file, whose own entries begin at ``first``."""

    file: Any
    name: str
    first: int
    length: int
    low: int
    high: int

    def read(self, part: str) -> Tensor:
        """The part's values, in full precision."""
        stored = self.file.get_slice(f"{self.name}/{part}")
        if f"{self.name}/{part}_absmax" not in self.file.keys():  # noqa: SIM118 - not a mapping
            return stored[self.low : self.high]
        block = self.low // BLOCK_SIZE
        scales = self.file.get_slice(f"{self.name}/{part}_absmax")[block : -(-self.high // BLOCK_SIZE)]
        codes = Blockwise(stored[block * BLOCK_SIZE : self.high], scales)
        return dequantize_blockwise(codes, signed=part == SIGNED)[self.low - block * BLOCK_SIZE :]


def _pieces(support: Support, files: dict[str, tuple[Any, dict[str, list[int]]]]) -> list[_Piece]:
    """Where a support's entries lie in the files, in rising order."""
    start, stop = support.offset, support.offset + support.runs.num_entries
    found = []
    for file, intervals in files.values():
        first, last = intervals[support.name]
        low, high = max(start, first), min(stop, last)
        if low < high:
            found.append(_Piece(file, support.name, first, last - first, low - first, high - first))
    return sorted(found, key=lambda piece: piece.first)


def _join(support: Support, pieces: list[_Piece], part: str) -> Tensor:
    return torch.cat([piece.read(part) for piece in pieces]) if pieces else support.grad.cpu()[:0]


def _copy_exactly(support: Support, state: State, moment: str, pieces: list[_Piece]) -> bool:
    """Copy a moment as it is stored, codes and scales included; False where the partition or the kind differs."""
    if len(pieces) != 1 or pieces[0].length != support.runs.num_entries:
        return False
    stored = {key: state[key] for key in (moment, f"{moment}_absmax") if key in state}
    names = pieces[0].file.keys()
    quantized = f"{support.name}/{moment}_absmax" in names
    if quantized != is_quantized(state):
        return False
    for key, target in stored.items():
        target.copy_(pieces[0].file.get_tensor(f"{support.name}/{key}"))
    return True


def _check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raise ValueError on every rank when a file is not what the manifest says; each rank reads its share of them."""
    damaged = [
        name
        for name in sorted(files)[dist.rank() :: dist.world_size()]
        if not (folder / name).is_file() or sha256(folder / name) != files[name]["sha256"]
    ]
    found = [name for names in dist.gather_objects(damaged) for name in names]
    if found:
        raise ValueError(
            f"{folder / found[0]}: missing or damaged; delete {folder} to start from an older state or anew"
        )


def _rank_file() -> str:
    return f"rank-{dist.rank():05d}.safetensors"
