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
    if source.name != here.config.name:
        return cfg
    kept = load_yaml(source.read_text(encoding="utf-8"))
    place = kept.get("run_dir")
    if not isinstance(place, str) or RunFolder.of(place).config.exists() or not _is_run(here, kept, place):
        return cfg
    return _moved(cfg, Path(place).absolute(), here.root)  # type: ignore[no-any-return]


def _is_run(folder: RunFolder, kept: dict[str, Any], run_dir: str) -> bool:
    """Whether a configuration was kept by a run, and not written by a user beside the files of a project.

    A folder of an earlier release has no mark: its configuration names every field, and a stage has measured something.
    """
    if folder.mark.is_file():
        return folder.mark.read_text(encoding="utf-8") == run_dir
    whole = all(field.name in kept for field in fields(RunConfig))
    return whole and (folder.metrics.is_file() or folder.stages.is_file())


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
