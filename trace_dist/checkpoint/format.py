"""What lies in a checkpoint, and the proof that it is what was written.

A checkpoint is a folder::

    step-00000100/rank-00000.safetensors    one rank's tensors and random state
    step-00000100/mask.safetensors          of masked training: the mask (global indices)
    step-00000100/manifest.json             checksums of the files, schedule and data position; written last

The manifest's own ``sha256`` is that of everything else in it, as JSON with sorted keys and without spaces.

Where training looks at validation examples, the ranks' files also have ``<param>/best``: the values of the best look so far. The
manifest then says ``best``, and is of version 4; earlier releases, which would lose them, refuse it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from trace_dist.utils import dist
from trace_dist.utils.files import read_json, sha256, write_json
from trace_dist.utils.together import on_all

FORMAT = "trace_dist.checkpoint"
VERSION, WITH_BEST = 3, 4
"""Of a checkpoint, and of one that has the best values beside the present ones."""
READABLE = (2, VERSION, WITH_BEST)
"""Version 2 has no checksum of its own and knows no other kind than ``masked``."""
BEST = "best"
"""Key of a manifest, and name of a part of each parameter."""
MANIFEST, MASK = "manifest.json", "mask.safetensors"
Kind = Literal["masked", "dense"]
_FILE = re.compile(r"rank-\d{5,}\.safetensors|mask\.safetensors")


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def damaged(path: Path) -> Damaged:
    """The error of a file of a checkpoint that is missing or changed."""
    return Damaged(f"{path}: missing or damaged; delete {path.parent} to start from an older state or anew")


@contextmanager
def _asked_for(path: Path) -> Iterator[None]:
    """Where a file of a checkpoint is read.

    Raises:
        Damaged: it is not there.
        ValueError: the system does not let it be read, as for want of a permission or of a server's answer. What is in it may be
            whole, so that nobody passes it over.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise damaged(path) from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror or error}); mend that and start again, or delete {path.parent} to start "
            "from an older state or anew"
        ) from None


def rank_file(rank: int | None = None) -> str:
    """Name of a rank's file; this rank's when None."""
    return f"rank-{dist.rank() if rank is None else rank:05d}.safetensors"


def checked_state(state: Any) -> str:
    """A state as JSON; raises ValueError where it cannot be kept so."""
    try:
        return json.dumps(state, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"state: cannot be kept as JSON ({error}); use finite numbers, strings, lists and dictionaries"
        ) from None


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write the manifest, with its checksum."""
    content = {"format": FORMAT, "version": WITH_BEST if content.get(BEST) else VERSION, **content}
    write_json(folder / MANIFEST, {**content, "sha256": _digest(json.loads(json.dumps(content)))})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, in this version's shape.

    Raises:
        Damaged: it is missing or changed.
        ValueError: it is of another version, or cannot be read.
    """
    path = folder / MANIFEST
    # Of one that is missing more is said below.
    with suppress(Damaged), _asked_for(path):
        path.read_bytes()
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise Damaged(str(error)) from None
    foreign = f"{folder}: not a version {VERSION} or {WITH_BEST} trace_dist checkpoint; give the right folder"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Damaged(foreign)
    digest, version = manifest.pop("sha256", None), manifest.get("version")
    if (digest is not None or version in (VERSION, WITH_BEST)) and digest != _digest(manifest):
        raise damaged(path)
    if version not in READABLE:
        raise ValueError(foreign)
    manifest.setdefault("kind", "masked")
    if not _has_shape(manifest):
        raise damaged(path)
    return manifest


def read_checked(folder: Path, kind: Kind | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all whole; each rank reads its share of them. Collective.

    Raises:
        ValueError: as ``read_manifest``, on every rank; a file is damaged or cannot be read; or it is of another kind.
    """

    def check() -> dict[str, Any]:
        manifest = read_manifest(folder)
        if kind not in (None, manifest["kind"]):
            raise ValueError(
                f"{folder}: a checkpoint of {manifest['kind']} training, not of {kind}; give the right folder"
            )
        for name in sorted(manifest["files"])[dist.rank() :: dist.world_size()]:
            with _asked_for(folder / name):
                if sha256(folder / name) != manifest["files"][name]["sha256"]:
                    raise damaged(folder / name)
        return manifest

    return on_all(check)


def open_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Files of a checkpoint, opened: name -> handle of ``safetensors``. Collective.

    Raises:
        Damaged: one is none.
        ValueError: one cannot be read.
    """

    def opened() -> dict[str, Any]:
        files = {}
        for name in names:
            try:
                with _asked_for(folder / name):
                    # safetensors calls whatever the system refuses a missing file.
                    (folder / name).open("rb").close()
                    files[name] = safe_open(str(folder / name), framework="pt")
            except SafetensorError:
                raise damaged(folder / name) from None
        return files

    return on_all(opened)


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_map(value: Any, of: Callable[[Any], bool]) -> bool:
    """Whether a JSON value is an object whose values are all of one sort."""
    return isinstance(value, dict) and all(map(of, value.values()))


def _digest(content: dict[str, Any]) -> str | None:
    """Hex digest of a manifest that came from JSON; None where it is nested too deeply to be one."""
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _has_shape(manifest: dict[str, Any]) -> bool:
    """Whether everything that every kind needs is there."""
    files = manifest.get("files")
    return (
        is_count(manifest.get("step"))
        and isinstance(manifest.get("state"), dict)
        and isinstance(manifest.get(BEST, False), bool)
        and is_map(files, _is_file)
        and rank_file(0) in files  # type: ignore[operator]
        and all(map(_FILE.fullmatch, files))  # type: ignore[arg-type]
    )


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and is_map(entry.get("intervals"), _is_interval)
    )


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value)) and value[0] <= value[1]
