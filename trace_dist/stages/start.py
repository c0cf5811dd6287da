"""How a command begins: the parts that it names exist, the ranks have met, its configuration fits the run folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from trace_dist.config import RunConfig
from trace_dist.parts import METHODS, PLACEMENTS, SCORES
from trace_dist.utils import dist
from trace_dist.utils.files import write_text
from trace_dist.utils.yaml import load_yaml

HOW_IT_RUNS = ("launch", "backend", "continual.methods")
"""Fields that say how a run is carried out, not what it computes: they may differ between its commands."""


def start(cfg: RunConfig, whole_run: bool = False) -> None:
    """Check the configuration's parts, join the job, and write the configuration beside the results.

    Args:
        cfg: the configuration of this command.
        whole_run: the stages of a run read the file that lies there, so it is also replaced where only how it runs differs.

    Raises:
        ValueError: a part or an option does not exist, too many ranks for the backend, or the folder holds results of
            another configuration.
    """
    check_parts(cfg)
    dist.init_distributed()
    if cfg.backend == "single" and dist.world_size() > 1:
        raise ValueError(
            f"backend='single': {dist.world_size()} ranks were started; set --backend zero3, or start one process"
        )
    if dist.is_main():
        _keep_config(cfg, whole_run)


def check_parts(cfg: RunConfig) -> None:
    """Raise ``ValueError`` where the drop-in parts or their options do not exist or do not fit."""
    SCORES.load(cfg.probe.score)
    placement = PLACEMENTS.load(cfg.projection.placement)
    options = PLACEMENTS.options(cfg.projection.placement, cfg.projection.options)
    # Without a proxy nothing is projected.
    if cfg.proxy is not None and hasattr(placement, "check_mask"):
        placement.check_mask(options, cfg.mask)
    for name in dict.fromkeys((*cfg.continual.methods, *cfg.continual.options)):
        METHODS.options(name, cfg.continual.options.get(name))
    dense = [name for name in cfg.continual.methods if not METHODS.load(name).masked]
    if dense and cfg.target.quantize != "none":
        raise ValueError(
            f"continual.methods={dense!r}: train dense weights, but target.quantize is {cfg.target.quantize!r}; "
            "remove them"
        )


def _keep_config(cfg: RunConfig, whole_run: bool) -> None:
    path = cfg.folder.config
    present = json.loads(json.dumps(asdict(cfg)))
    differing = _differing(_read_yaml(path), present) if path.is_file() else ["everything"]
    if differing and path.is_file() and _holds_more_than(path):
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: it holds results made with other values of {', '.join(differing)}; "
            "choose another run_dir, or delete this one"
        )
    if differing or whole_run:
        write_text(path, yaml.safe_dump(present, sort_keys=False))


def _holds_more_than(path: Path) -> bool:
    """Whether any file lies beside this one; a run that failed before it made one may be started with other values."""
    for other in path.parent.rglob("*"):
        hidden = any(part.startswith(".") for part in other.relative_to(path.parent).parts)
        if other.is_file() and other != path and not hidden:
            return True
    return False


def _read_yaml(path: Path) -> Any:
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}); restore it or delete the run folder") from None


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Names of the fields whose values differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    names = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{prefix}.{key}" if prefix else key
        if name not in HOW_IT_RUNS:
            names += _differing(old.get(key), new.get(key), name)
    return names
