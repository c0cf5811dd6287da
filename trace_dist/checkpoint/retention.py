"""Which checkpoints of a folder count, and which are dropped.

A newer checkpoint replaces an older one only once it is durable, and one older one stays: should the newest turn out to
be damaged when it is needed, the work since the one before is lost, not all of it.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from trace_dist.checkpoint.format import MANIFEST, Damaged, read_checked, read_manifest
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)

KEEP = 2
"""Checkpoints kept in a folder."""
_NAME = re.compile(r"step-(\d+)")


def folder_name(step: int) -> str:
    """Name of the checkpoint after a number of optimizer steps."""
    return f"step-{step:08d}"


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that is whole, or None; damaged ones are passed over with a warning. Collective.

    Every byte is read, as ``load_checkpoint`` does again: half a second per GiB, once per resume.

    Raises:
        ValueError: the newest is of another version of the format, or cannot be read: it may be whole.
    """
    for folder in on_main(lambda: [path for path in _newest_first(root) if (path / MANIFEST).is_file()]):
        try:
            read_checked(folder)
        except Damaged as error:
            if dist.is_main():
                logger.warning("%s; the checkpoint before it is used, if there is one", error)
        else:
            return folder
    return None


def newest_manifest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose manifest is whole, with it; its other files are not looked at. On one rank.

    Raises:
        ValueError: as ``latest_checkpoint``.
    """
    for folder in _newest_first(root):
        if (folder / MANIFEST).is_file():
            with suppress(Damaged):
                return folder, read_manifest(folder)
    return None


def drop_others(root: Path, newest: Path, keep: int = KEEP) -> None:
    """Delete all but ``newest`` and the whole ones before it, ``keep`` in all. On one rank.

    Later steps go too: they are what was left of damaged checkpoints.
    """
    present = _newest_first(root)
    before = [path for path in present[present.index(newest) + 1 :] if _looks_whole(path)]
    kept = {newest, *before[: keep - 1]}
    hidden = [*root.glob(".step-*.partial"), *root.glob(".step-*.replaced")]
    for path in [*hidden, *(path for path in present if path not in kept)]:
        shutil.rmtree(path, ignore_errors=True)


def _newest_first(root: Path) -> list[Path]:
    steps = {path: int(found[1]) for path in root.glob("step-*") if (found := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _looks_whole(folder: Path) -> bool:
    """Whether the manifest and all files are there; their content is read when it is needed."""
    try:
        return all((folder / name).is_file() for name in read_manifest(folder)["files"])
    except ValueError:
        return False
