"""Which fields of a configuration may change in a run folder: those that nothing there was made with.

So a learning rate that let training diverge can be lowered and the same command started again: masks and bases are kept, and the
newest checkpoint is continued. Results of two configurations never lie in one folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trace_dist.config import ModelConfig, RunConfig
from trace_dist.config.how_it_runs import HOW_IT_RUNS
from trace_dist.config.moved import PLACES

LOGS = (
    "config.yaml",
    "metrics.jsonl",
    "tensorboard/*",
    "trackers/*",
    "logs/*",
    "stages.json",
    "tasks.json",
    "density.json",
    "progress/*/race.json",
    "progress/*/made_of.json",
)
"""Files that are no results; a race is held again where anything differs that it was held with, and so is a folding."""
TRACES = ("probe/traces/*", "probe/sketches/*")
"""What of a probe says itself with which options it was made, and is made again with others."""
PROBED = ("probe/*",)
TRAINED = (
    "deltas/*",
    "bank*/deltas/*",
    "bank*/tasks/*/delta.safetensors",
    "methods/*",
    "progress/*/state-*/*",
    "progress/*/trained/*",
)
"""What a training has left: a method that was cut in its first task has the base's scores and signature alone."""
MASKED = ("masks/*", "memory.json", *TRAINED)
"""Masks and what is made with them. Patterns are of paths in the run folder; ``*`` goes through folders."""
SCORED = ("methods/*", "progress/*")
"""Scores, those of the base among them."""


def completed(kept: Any, cfg: Any) -> Any:
    """A configuration that was kept, with the fields that it lacks at their defaults: an earlier release did not have them.

    Args:
        kept: plain values, as they were read.
        cfg: the present configuration, or a part of it; says which fields there are.
    """
    if isinstance(kept, list) and isinstance(cfg, list) and len(kept) == len(cfg):
        return [completed(*pair) for pair in zip(kept, cfg, strict=True)]
    if not (isinstance(kept, dict) and is_dataclass(cfg)):
        return kept
    present = {name: completed(value, getattr(cfg, name, None)) for name, value in kept.items()}
    return {entry.name: _default(entry) for entry in fields(cfg)} | present


def _default(entry: Field[Any]) -> Any:
    """A field's default as a plain value; None where it has none."""
    value = entry.default if entry.default_factory is MISSING else entry.default_factory()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    return None if value is MISSING else json.loads(json.dumps(value))


def differing_fields(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Names of the fields whose values differ, but for HOW_IT_RUNS; tasks go by their names, as ``tasks.copy.steps``."""
    old, new = _by_name(old, new)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    names = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}.{key}" if prefix else key
        if name not in HOW_IT_RUNS:
            names += differing_fields(old.get(key), new.get(key), name)
    return names


def at_home(old: Any, new: Any, old_root: Path, new_root: Path) -> Any:
    """A kept configuration, with the new one's words for places that are the same: a run folder may be moved, alone or with what
    lies beside it, and a command may be started in another folder.

    Args:
        old: the kept one, or a part of it.
        new: the present one, or the same part.
        old_root: the run folder by its old name.
        new_root: and by its present one.
    """
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [at_home(*pair, old_root, new_root) for pair in zip(old, new, strict=True)]
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old
    kept = {}
    for key, value in old.items():
        other = new.get(key)
        place = key in PLACES and isinstance(value, str) and isinstance(other, str)
        if place and _same_place(value, str(other), old_root, new_root):
            kept[key] = other
        else:
            kept[key] = at_home(value, other, old_root, new_root)
    return kept


def _same_place(old: str, new: str, old_root: Path, new_root: Path) -> bool:
    """Whether two paths name one place, as such or as seen from the run folder."""
    # Earlier releases have kept ~ as it was written.
    old = os.path.expanduser(old)
    seen = (os.path.relpath(old, old_root), os.path.relpath(new, new_root))
    return Path(old).absolute() == Path(new).absolute() or seen[0] == seen[1]


def forbidden(cfg: RunConfig, fields: Iterable[str]) -> dict[str, list[str]]:
    """The fields that may not change, with the results in the run folder that were made with them.

    Args:
        cfg: the new configuration.
        fields: whose values differ from those of the folder.
    """
    results, found = list(_results(Path(cfg.run_dir))), dict[str, list[str]]()
    for field in fields:
        patterns = _depending_on(field, cfg)
        remade = TRACES if field.startswith("probe.") else ()
        found[field] = [path for path in results if _matches(path, patterns) and not _matches(path, remade)]
    return {field: paths for field, paths in found.items() if paths}


def _depending_on(field: str, cfg: RunConfig) -> tuple[str, ...]:
    """Patterns of the results that a field has a part in."""
    proxy = () if cfg.proxy is None else _base(cfg, cfg.proxy)
    proxy_is_cut_out = cfg.proxy is None or cfg.proxy.prune is not None
    upstream = (*proxy, *PROBED) if proxy_is_cut_out else ()
    rules = {
        "train.state_dtype": (*TRAINED, "memory.json"),
        "train.master": (*TRAINED, "memory.json"),
        "train.*": TRAINED,
        "race.*": TRAINED,
        "tasks.*.steps": TRAINED,
        "continual.options.*": _of_method(_method_of(field, cfg)),
        "continual.options": TRAINED,
        "bank.composition*": TRAINED,
        "bank.keep": TRAINED,
        "bank.*": ("bank*/*", *SCORED),
        "eval.*": ("eval.json", *SCORED),
        "projection.*": MASKED,
        "mask.isolation*": MASKED,
        "mask.*": (*PROBED, *MASKED),
        "probe.*": (*PROBED, *MASKED),
        "proxy*": (*proxy, *PROBED, *MASKED),
        "target.*": (*_base(cfg, cfg.target), *upstream, "eval.json", "bank*/tasks/*", *SCORED, *MASKED),
        "*": ("*",),
    }
    return next(patterns for rule, patterns in rules.items() if fnmatchcase(field, rule))


def _of_method(name: str) -> tuple[str, ...]:
    """What a method's training leaves."""
    bank = "bank" if name == "retrieved" else f"bank_{name}"
    return (
        f"methods/{name}.json",
        *(f"progress/{name}/{part}/*" for part in ("state-*", "trained")),
        *(f"{bank}/{part}" for part in ("deltas/*", "tasks/*/delta.safetensors")),
    )


def _base(cfg: RunConfig, model: ModelConfig) -> tuple[str, ...]:
    """Where a base model lies, if in the run folder."""
    folder, root = Path(model.path).absolute(), Path(cfg.run_dir).absolute()
    return (f"{folder.relative_to(root).as_posix()}/*",) if folder.is_relative_to(root) else ()


def _results(folder: Path) -> Iterator[str]:
    """Every file that is a result, relative to the folder; hidden ones are none."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and not _matches(relative.as_posix(), LOGS):
            yield relative.as_posix()


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _by_name(old: Any, new: Any) -> tuple[Any, Any]:
    """Two lists of the same tasks as dictionaries; anything else as it is."""
    named = [
        isinstance(each, list) and all(isinstance(item, dict) and "name" in item for item in each)
        for each in (old, new)
    ]
    if not all(named) or [item["name"] for item in old] != [item["name"] for item in new]:
        return old, new
    return {item["name"]: item for item in old}, {item["name"]: item for item in new}


def _method_of(field: str, cfg: RunConfig) -> str:
    """The method that an option is of: some are named by the path of a module, which has dots."""
    option = field.removeprefix("continual.options.")
    named = [name for name in cfg.continual.options if option.startswith(f"{name}.")]
    # Without options of its own the method is all that differs.
    return max(named, key=len, default=option)
