"""A run folder that was moved or renamed: what its kept configuration says of places in it holds for where it lies now."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from trace_dist.config.run import RunConfig
from trace_dist.run_folder import RunFolder
from trace_dist.utils.yaml import load_yaml

PLACES = ("run_dir", "path", "gguf")
"""Names of the fields that hold a file or a folder, whatever section they are in."""


def in_new_place(cfg: RunConfig, source: Path) -> RunConfig:
    """The configuration that a moved run folder has kept, with every path inside the folder as it is now.

    Args:
        cfg: what was read.
        source: the file that it was read from.

    Returns:
        ``cfg`` itself, unless ``source`` is the kept configuration of a run, and its ``run_dir`` is another folder than the one
        it lies in, where no run is any more.
    """
    here = RunFolder(source.parent)
    work = (here.metrics, here.logs, here.results, here.methods, here.specificity)
    if source.name != here.config.name or not any(path.exists() for path in work):
        return cfg
    kept = load_yaml(source.read_text(encoding="utf-8")).get("run_dir")
    if not isinstance(kept, str) or RunFolder.of(kept).config.exists():
        return cfg
    return _moved(cfg, Path(kept).absolute(), here.root)  # type: ignore[no-any-return]


def _moved(value: Any, old: Path, new: Path, name: str = "") -> Any:
    """A section, a list of them or a value, with the places in it that lie in the old folder."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = {
            each.name: _moved(getattr(value, each.name), old, new, each.name) for each in fields(value)
        }
        return replace(value, **changed)
    if isinstance(value, list):
        return [_moved(each, old, new, name) for each in value]
    if name in PLACES and isinstance(value, str):
        place = Path(value).absolute()
        return str(new / place.relative_to(old)) if place.is_relative_to(old) else value
    return value
