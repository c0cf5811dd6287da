"""Writing a checkpoint: under a hidden name, file by file, flushed to the disk, and renamed when it is whole.

Nothing is written, and no older checkpoint touched, unless all values are finite and the disk has room on every rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trace_dist.checkpoint.format import FORMAT, Kind, check_state, rank_file, write_manifest
from trace_dist.checkpoint.random_state import random_state
from trace_dist.checkpoint.retention import KEEP, drop_others, folder_name
from trace_dist.utils import dist
from trace_dist.utils.files import check_free_space, flush_folder, save_tensors, sha256, writing
from trace_dist.utils.together import on_all

HEADER_BYTES = 2**20
"""Room left for each file's header."""


@dataclass(frozen=True)
class FileBeside:
    """A file that rank 0 adds to those of the ranks."""

    name: str
    num_bytes: int
    write: Callable[[Path], object]


@dataclass(frozen=True)
class Contents:
    """What this rank puts into a checkpoint.

    Attributes:
        kind: of training.
        tensors: ``<param>/<part>`` -> values.
        intervals: which of a parameter's masked entries the tensors hold, [start, stop).
        facts: further keys of the manifest, the same on every rank.
        beside: files that are not a rank's.
    """

    kind: Kind
    tensors: dict[str, Tensor]
    intervals: dict[str, list[int]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    beside: tuple[FileBeside, ...] = ()


def write_checkpoint(
    root: Path, step: int, contents: Contents, state: dict[str, Any], keep: int = KEEP
) -> Path:
    """Write a checkpoint and drop older ones. Collective.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done.
        contents: what this rank keeps.
        state: JSON-ready state of everything else.
        keep: checkpoints that stay in ``root``, this one among them.

    Raises:
        ValueError: a value is not finite, the state is not JSON, or the disk has no room: nothing has changed then.
    """
    final = root / folder_name(step)
    partial = root / f".{final.name}.partial"
    on_all(lambda: _check(step, contents, state))
    _check_room(root, contents)
    on_all(lambda: _begin(partial, contents) if dist.is_main() else None)
    mine = on_all(lambda: _write_rank(partial, contents))
    files = dict(dist.gather_objects(mine))

    def announce() -> None:
        beside = {file.name: _entry(partial / file.name) for file in contents.beside}
        content = {"kind": contents.kind, "step": step, **contents.facts, "files": {**files, **beside}}
        write_manifest(partial, {**content, "state": state})
        with writing(final):
            _rename(partial, final)
        drop_others(root, final, keep)

    on_all(lambda: announce() if dist.is_main() else None)
    return final


def _check(step: int, contents: Contents, state: dict[str, Any]) -> None:
    check_state(state)
    for name, tensor in contents.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            parameter, part = name.rsplit("/", 1)
            raise ValueError(
                f"checkpoint at step {step}: {part} of {parameter} is not finite, and nothing was written; lower the "
                "learning rate and continue from the checkpoint before"
            )


def _check_room(root: Path, contents: Contents) -> None:
    """Raise ValueError on every rank when a disk cannot take what all ranks write."""
    mine = sum(tensor.nbytes for tensor in contents.tensors.values())
    beside = sum(file.num_bytes for file in contents.beside)
    needed = sum(dist.gather_objects(mine)) + beside + HEADER_BYTES * (dist.world_size() + 1)
    on_all(lambda: check_free_space(root, needed))


def _begin(partial: Path, contents: Contents) -> None:
    with writing(partial):
        for abandoned in partial.parent.glob(".step-*.partial"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
        for file in contents.beside:
            file.write(partial / file.name)


def _write_rank(partial: Path, contents: Contents) -> tuple[str, dict[str, Any]]:
    """Write this rank's file: its name and what the manifest says of it."""
    name = rank_file()
    save_tensors(partial / name, random_state() | _apart(contents.tensors), {"format": FORMAT})
    return name, _entry(partial / name, contents.intervals)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where they share memory with others (tied weights), which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def _entry(path: Path, intervals: dict[str, list[int]] | None = None) -> dict[str, Any]:
    return {"sha256": sha256(path), "intervals": intervals or {}}


def _rename(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name, in place of one of the same step."""
    flush_folder(partial)
    if final.exists():
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    flush_folder(final.parent)
