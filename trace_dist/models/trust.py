"""Whether the Python code that a model's folder brings may run: only where the model was named for it.

``auto_map`` in a config or a tokenizer's config names classes in files beside it. Where nobody asked for them they are neither
fetched nor run, and nobody is asked at a prompt. The permission is this process's, for the models that were named, until it ends.
"""

from __future__ import annotations

from pathlib import Path

from trace_dist.utils.home import from_home

_TRUSTED: set[str] = set()


def trust(path: str | Path) -> None:
    """Let the code of a model run: of this folder or hub id."""
    _TRUSTED.add(_key(path))


def is_trusted(path: str | Path) -> bool:
    """Whether the code of this folder or hub id may run; of what has no name it may not."""
    return bool(str(path)) and _key(path) in _TRUSTED


def _key(path: str | Path) -> str:
    # The same for a folder that is yet to be made; a hub id has no other meaning as long as the process stays where it is.
    return str(from_home(path).resolve())
