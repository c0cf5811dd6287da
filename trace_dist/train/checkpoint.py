"""Checkpoints of masked training: only what the mask holds, loadable on any number of ranks.

A checkpoint is a folder::

    step-00000100/rank-00000.safetensors    <param>/{master,exp_avg,exp_avg_sq}: this rank's entries; random state
    step-00000100/mask.safetensors          the mask (global indices)
    step-00000100/manifest.json             intervals, checksums, schedule and data position; written last

A rank's support is a contiguous slice of the mask's sorted entries, so each file states one interval [start, stop) per parameter,
and any other partition reads the slices that it needs. The base model is referenced by its fingerprint, never copied.
The folder appears under its final name only when it is whole. On the same number of ranks a resumed run repeats the uninterrupted
one bit for bit, dropout included; on another number the random state starts anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trace_dist.masks.format import Mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.utils import dist
from trace_dist.utils.files import check_free_space, read_json, save_tensors, sha256, write_json

VERSION = 1
PARTS = ("master", "exp_avg", "exp_avg_sq")
MANIFEST = "manifest.json"


def save_checkpoint(root: Path, step: int, optimizer: MaskedAdamW, state: dict[str, Any]) -> Path:
    """Write a checkpoint and drop older ones. Collective.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done.
        optimizer: its masters and moments are written.
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
            "param_steps": {support.name: state["step"] for support, _, state in optimizer.compact()},
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
    mine = sum(len(PARTS) * master.nbytes for _, master, _ in optimizer.compact())
    mask = sum(units.nbytes for units in optimizer.mask.units.values())
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
    for support, master, state in optimizer.compact():
        intervals[support.name] = [support.offset, support.offset + support.runs.num_entries]
        tensors |= {f"{support.name}/{part}": _part(master, state, part) for part in PARTS}
    save_tensors(path, tensors, {"format": "trace_dist.checkpoint"})
    return intervals


def _random_state() -> dict[str, torch.Tensor]:
    """State of the generators that dropout draws from."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


def _part(master: torch.nn.Parameter, state: dict[str, Any], part: str) -> torch.Tensor:
    return master.data if part == "master" else state[part]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return max((path for path in root.glob("step-*") if (path / MANIFEST).is_file()), default=None)


def load_mask(folder: Path) -> Mask:
    """The mask of a checkpoint."""
    return Mask.load(folder / "mask.safetensors")


def load_checkpoint(folder: Path, optimizer: MaskedAdamW) -> dict[str, Any]:
    """Restore masters, moments and weights on any number of ranks, and the random state on the same number. Collective.

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
    for support, master, state in optimizer.compact():
        state["step"] = manifest["param_steps"][support.name]
        start, stop = support.offset, support.offset + support.runs.num_entries
        for part in PARTS:
            target = _part(master, state, part)
            for name, entry in manifest["files"].items():
                first, last = entry["intervals"][support.name]
                low, high = max(start, first), min(stop, last)
                if low < high:
                    values = opened[name].get_slice(f"{support.name}/{part}")[low - first : high - first]
                    target[low - start : high - start].copy_(values)
    optimizer.write_back()
    if len(opened) == dist.world_size():
        mine = opened[_rank_file()]
        torch.set_rng_state(mine.get_tensor("random/cpu"))
        if torch.cuda.is_available() and "random/cuda" in mine.keys():  # noqa: SIM118 - not a mapping
            torch.cuda.set_rng_state(mine.get_tensor("random/cuda"))
    return manifest


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
