"""What the records and masks of a study depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from trace_dist.config import RunConfig
from trace_dist.studies.plan import StudyConfig

SECTIONS = ("target", "proxy", "tasks", "general", "data", "probe", "mask", "projection", "train", "seed")
"""Sections of a run that trials depend on; tasks one by one."""


def abouts(cfg: RunConfig, study: StudyConfig) -> dict[str, str]:
    """Task -> digest of all that a record of it depends on, beside arm, density, seed and rate."""
    values = {name: asdict(cfg)[name] for name in SECTIONS if name != "tasks"}
    # Where models and data lie does not matter, nor what a default density is.
    values["mask"].pop("density")
    for model in ("target", "proxy"):
        if values[model]:
            values[model].pop("path")
    values["options"] = cfg.continual.options
    values |= {
        name: asdict(study)[name]
        for name in ("validation", "proxy_probe", "plain", "text", "text_tokens", "num_texts")
    }
    values["densities"] = study.densities
    found = {}
    for task in cfg.tasks:
        own = {**values, "task": {**asdict(task), "path": None}}
        found[task.name] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    return found
