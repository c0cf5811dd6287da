"""Gather what the stages of a run left in its folder into one ``results.json``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_dist.config import RunConfig
from trace_dist.continual.memory import memory_path
from trace_dist.masks.format import Mask
from trace_dist.models.roles import describe
from trace_dist.parts import METHODS
from trace_dist.probe.probe import probe_folder, proxy_mask_path
from trace_dist.probe.project import mask_path
from trace_dist.run_folder import RunFolder
from trace_dist.utils.env import meta_info
from trace_dist.utils.files import read_json

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "embed", "head", "norm", "bias", "other")


def collect_results(cfg: RunConfig) -> dict[str, Any]:
    """The results of a run, with everything that has been measured so far.

    Raises:
        ValueError: no method has a result yet.
    """
    folder = RunFolder.of(cfg.run_dir)
    paths = {path.stem: path for path in sorted(folder.methods.glob("*.json"))}
    known = [name for name in METHODS if name in paths]
    modes = {name: read_json(paths[name]) for name in dict.fromkeys([*known, *paths])}
    if not modes:
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: no method has a result; start `trace-dist continual` (or `run`) first"
        )
    first = next(iter(modes.values()))
    names = [task.name for task in cfg.tasks]
    results: dict[str, Any] = {"tasks": names, "general": first["general_names"], "modes": modes}
    for key in ("retrieval", "delta_bytes", "bytes_per_entry"):
        if key in modes.get("retrieved", {}):
            results[key] = modes["retrieved"][key]
    for key, path in (
        ("specificity", probe_folder(cfg) / "specificity.json"),
        ("memory", memory_path(cfg)),
        ("baselines", folder.tasks),
    ):
        if path.is_file():
            results[key] = read_json(path)
    results["masks"] = {
        "proxy": _densities((name, proxy_mask_path(cfg, name)) for name in names),
        "target": _densities((name, mask_path(cfg, name)) for name in names),
    }
    stages = Path(cfg.run_dir) / "stages.json"
    timings = read_json(stages) if stages.is_file() else {}
    launched = {"launcher": cfg.launch.launcher, "num_ranks": cfg.launch.num_ranks, "backend": cfg.backend}
    measured = {"seconds": timings.get("wall_seconds"), "stages": timings.get("stages", {})}
    results["run_info"] = {
        **first["measured"],
        **measured,
        **launched,
    }  # when and from which commit, not of this report
    results["meta_info"] = meta_info()
    results["config"] = asdict(cfg)
    return results


def _densities(paths: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """Task -> density of each role in each layer (null where a layer has no such tensor)."""
    found = {}
    for name, path in paths:
        if path.is_file():
            found[name] = mask_heat_map(Mask.load(path))
    return found


def mask_heat_map(mask: Mask) -> dict[str, Any]:
    """Layers, roles, and the density of every maskable tensor at their crossing."""
    infos = describe({name: layout.shape for name, layout in mask.layouts.items()})
    placed = [info for info in infos.values() if info.layer is not None]
    num_layers = 1 + max((info.layer for info in placed if info.layer is not None), default=0)
    roles = [role for role in ROLES if any(info.role == role for info in placed)]
    selected = {(layer, role): [0.0, 0.0] for layer in range(num_layers) for role in roles}
    for info in placed:
        if info.layer is not None:
            cell = selected[info.layer, info.role]
            numel = mask.layouts[info.name].numel
            cell[0] += mask.tensor_density(info.name) * numel
            cell[1] += numel
    density = [
        [
            selected[layer, role][0] / selected[layer, role][1] if selected[layer, role][1] else None
            for role in roles
        ]
        for layer in range(num_layers)
    ]
    return {"layers": num_layers, "roles": roles, "density": density}
