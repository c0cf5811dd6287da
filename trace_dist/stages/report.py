"""Stage ``report``: gather what the stages of a run left in its folder into ``results.json``, and draw it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.overlap import mask_overlap, overlap
from trace_dist.config import RunConfig
from trace_dist.continual.result import read_result
from trace_dist.masks.mask import Mask
from trace_dist.models.architecture import MOST_LAYERS
from trace_dist.models.roles import describe
from trace_dist.parts import METHODS
from trace_dist.report import render_png, write_report
from trace_dist.stages.stage import read_timings
from trace_dist.utils.env import meta_info
from trace_dist.utils.files import read_json, reading, write_json
from trace_dist.utils.sealed import read_record

ROLES = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "embed", "head", "norm", "bias", "other")


def run_report(cfg: RunConfig, picture: str | None = None) -> dict[str, Any]:
    """Write ``results.json``, ``report.html``, and the key panels as a PNG file where one is named; returns the results.

    Raises:
        ValueError: no method has a result yet.
    """
    results = collect_results(cfg)
    write_json(cfg.folder.results, results)
    write_report(results, cfg.folder.report)
    if picture is not None:
        render_png(results, Path(picture))
    return results


def collect_results(cfg: RunConfig) -> dict[str, Any]:
    """The results of a run, with everything that has been measured so far.

    Raises:
        ValueError: no method has a result yet.
    """
    folder, names = cfg.folder, [task.name for task in cfg.tasks]
    methods = _methods(folder.methods)
    if not methods:
        raise ValueError(
            f"run_dir={cfg.run_dir!r}: no method has a result; start `trace-dist continual` (or `run`) first"
        )
    first = next(iter(methods.values()))
    results: dict[str, Any] = {"tasks": names, "general": first["general_names"], "modes": methods}
    for key in ("retrieval", "delta_bytes", "bytes_per_entry"):
        if key in methods.get("retrieved", {}):
            results[key] = methods["retrieved"][key]
    parts = {"specificity": folder.specificity, "memory": folder.memory, "baselines": folder.tasks}
    results |= {key: _part(path) for key, path in parts.items() if path.is_file()}
    if folder.density.is_file():
        found = read_record(folder.density, "delete it to let the densities race again", bare=True)
        with reading(folder.density, "density"):
            results["density"] = {key: found[key] for key in ("density", "margin", "tried")}
    results["masks"] = {
        "proxy": _densities((name, folder.proxy_mask(name)) for name in names),
        "target": _densities((name, folder.mask(name)) for name in names),
    }
    results["overlap"] = {
        name: _overlap(cfg, name) for name, method in methods.items() if method.get("masked")
    }
    timings = read_timings(folder.stages) if folder.stages.is_file() else {}
    measured = [method["measured"] for method in methods.values()]
    results["run_info"] = {
        # When the methods ran and from which commits, not this report; `measured` of a method names its own.
        "date": min((each["date"] for each in measured if each.get("date")), default=None),
        "commits": list(dict.fromkeys(each["commit"] for each in measured if each.get("commit"))),
        "seconds": timings.get("wall_seconds"),
        "stages": timings.get("stages", {}),
        "launcher": cfg.launch.launcher,
        "num_ranks": cfg.launch.num_ranks,
        "backend": cfg.backend,
    }
    return results | {"meta_info": meta_info(), "config": asdict(cfg)}


def _part(path: Path) -> Any:
    """What a stage has left for the report.

    Raises:
        ValueError: it is damaged, or holds a number that no JSON holds.
    """
    value = read_json(path)
    with reading(path, "results"):
        json.dumps(value, allow_nan=False)
    return value


def _methods(folder: Path) -> dict[str, Any]:
    """Method -> result, the project's own methods first."""
    found = sorted(path.stem for path in folder.glob("*.json"))
    names = [*(name for name in METHODS if name in found), *(name for name in found if name not in METHODS)]
    results = {name: read_result(folder / f"{name}.json") for name in names}
    # Thousands of numbers, which no page shows.
    return {
        name: {key: value for key, value in result.items() if key != "per_example"}
        for name, result in results.items()
    }


def _overlap(cfg: RunConfig, method: str) -> dict[str, Any]:
    """How much of each task's mask (row) other tasks' hold too: those of the method's bank, or, without one, of the run."""
    if cfg.bank_of(method).index.is_file():
        names, matrix = overlap(DeltaBank(cfg.bank_of(method).root))
    else:
        names = [task.name for task in cfg.tasks if cfg.folder.mask(task.name).is_file()]
        matrix = mask_overlap([Mask.load(cfg.folder.mask(name)) for name in names])
    return {"tasks": names, "matrix": matrix.tolist()}


def _densities(paths: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """Task -> density of each role in each layer (null where a layer has no such tensor)."""
    found = {}
    for name, path in paths:
        if path.is_file():
            found[name] = mask_heat_map(Mask.load(path))
    return found


def mask_heat_map(mask: Mask) -> dict[str, Any]:
    """Layers and roles of the text model, and the density of every maskable tensor at their crossing.

    Raises:
        ValueError: a tensor's name has a layer number that no model has.
    """
    infos = describe({name: layout.shape for name, layout in mask.layouts.items()})
    placed = [info for info in infos.values() if info.layer is not None and info.tower == "text"]
    num_layers = 1 + max((info.layer for info in placed if info.layer is not None), default=0)
    if num_layers > MOST_LAYERS:
        deepest = max(placed, key=lambda info: info.layer or 0).name
        raise ValueError(
            f"mask: {deepest!r} would be of layer {num_layers - 1}, and no model has more than {MOST_LAYERS}; make the mask anew"
        )
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
