"""Writing a checkpoint: under a hidden name, file by file, flushed to the disk, and renamed when it is whole.

No older checkpoint is touched unless all values are finite and the disk has room on every rank. ``write_checkpoint`` does all
of it while training waits; ``checkpoint.background`` takes the same steps beside training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trace_dist.checkpoint.format import FORMAT, Kind, checked_state, rank_file, write_manifest
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


class Write(Protocol):
    """What writes a checkpoint: ``write_checkpoint``, or ``Background.save``."""

    def __call__(
        self, root: Path, step: int, contents: Contents, state: dict[str, Any], keep: int = KEEP
    ) -> Path: ...


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

    Returns:
        Its folder.

    Raises:
        ValueError: a value is not finite, the state is not JSON, or the disk has no room: nothing has changed then.
    """
    on_all(lambda: check_values(step, contents))
    draft = Draft.begin(root, step, contents, state, keep)
    try:
        files = dict(dist.gather_objects(on_all(draft.write)))
        on_all(lambda: draft.announce(files) if dist.is_main() else None)
    except Exception:
        if dist.is_main():
            draft.abandon()
        raise
    return draft.final


@dataclass(frozen=True)
class Draft:
    """A checkpoint on its way to the disk: ``begin``, then ``write`` on every rank, then ``announce`` on rank 0.

    Attributes:
        final: its folder, once it is whole.
        step: optimizer steps done.
        contents: what this rank keeps.
        random: state of this rank's generators.
        state: of everything else, as JSON.
        keep: checkpoints that stay, this one among them.
    """

    final: Path
    step: int
    contents: Contents
    random: dict[str, Tensor]
    state: str
    keep: int

    @classmethod
    def begin(cls, root: Path, step: int, contents: Contents, state: dict[str, Any], keep: int) -> Draft:
        """Look for room, and make the hidden folder. Collective.

        Raises:
            ValueError: the state is not JSON, or the disk has no room: nothing has changed then.
        """
        kept = on_all(lambda: checked_state(state))
        draft = cls(root / folder_name(step), step, contents, random_state(), kept, keep)
        # First, as they take room that nobody sees.
        on_all(lambda: draft._drop_abandoned() if dist.is_main() else None)
        _check_room(root, contents)
        on_all(lambda: draft._make_folder() if dist.is_main() else None)
        return draft

    @property
    def hidden(self) -> Path:
        """Its folder until then."""
        return self.final.with_name(f".{self.final.name}.partial")

    def write(self) -> tuple[str, dict[str, Any]]:
        """Write this rank's file, and on rank 0 those beside it: the file's name, and what the manifest says of it."""
        if dist.is_main():
            for file in self.contents.beside:
                file.write(self.hidden / file.name)
        name = rank_file()
        save_tensors(self.hidden / name, self.random | _apart(self.contents.tensors), {"format": FORMAT})
        return name, _entry(self.hidden / name, self.contents.intervals)

    def announce(self, files: Mapping[str, dict[str, Any]]) -> None:
        """Write the manifest, give the folder its name and drop older ones. On rank 0, once all files are written.

        Args:
            files: what ``write`` gave on every rank.
        """
        beside = {file.name: _entry(self.hidden / file.name) for file in self.contents.beside}
        about = {"kind": self.contents.kind, "step": self.step, **self.contents.facts}
        write_manifest(self.hidden, {**about, "files": {**files, **beside}, "state": json.loads(self.state)})
        with writing(self.final):
            _rename(self.hidden, self.final)
        drop_others(self.final.parent, self.final, self.keep)

    def abandon(self) -> None:
        """Delete what was written. On rank 0, once no rank writes any more."""
        shutil.rmtree(self.hidden, ignore_errors=True)

    def _drop_abandoned(self) -> None:
        """Delete what a writer has left that was killed."""
        for abandoned in self.final.parent.glob(".step-*.partial"):
            # Over NFS a file that is still open stays, which is in nobody's way.
            shutil.rmtree(abandoned, ignore_errors=True)

    def _make_folder(self) -> None:
        with writing(self.hidden):
            self.hidden.mkdir(parents=True)


def check_values(step: int, contents: Contents) -> None:
    """Raise ValueError where a value is not finite."""
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
