"""What the records and masks of a study depend on.

[Note: what is left out] A value that is the default of its field is no part of a digest: an option that a later version adds
orphans no records.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any

from trace_dist.config import RunConfig
from trace_dist.studies.plan import StudyConfig

SECTIONS = ("target", "proxy", "tasks", "general", "data", "probe", "mask", "projection", "train", "seed")
"""Sections of a run that trials depend on; tasks one by one."""
OF_STUDY = ("validation", "proxy_probe", "plain", "text", "text_tokens", "num_texts", "densities")
"""Values of a study that they depend on. Pools have the proportions of the largest density."""
PLACES = {"target": "path", "proxy": "path", "mask": "density"}
"""Fields that do not matter: where models lie, and the density of a run."""


def abouts(cfg: RunConfig, study: StudyConfig) -> dict[str, str]:
    """Task -> digest of all that a record of it depends on, beside arm, density, seed and rate."""
    values = {name: chosen(getattr(cfg, name)) for name in SECTIONS if name != "tasks"}
    for section, name in PLACES.items():
        if isinstance(values[section], dict):
            values[section].pop(name, None)
    values["options"] = cfg.continual.options
    values |= {name: chosen(getattr(study, name)) for name in OF_STUDY}
    found = {}
    for task in cfg.tasks:
        own = chosen(task)
        own.pop("path", None)
        text = json.dumps({**values, "task": own}, sort_keys=True)
        found[task.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def shown(cfg: RunConfig, *more: str) -> dict[str, Any]:
    """The sections that trials depend on, and some more, for a study's result; JSON-ready."""
    found = asdict(cfg)
    return {name: found[name] for name in (*SECTIONS, "continual", *more)}


def chosen(value: Any) -> Any:
    """A section as plain values without those that are defaults ([Note: what is left out]); lists of sections likewise."""
    if isinstance(value, list | tuple):
        return [chosen(each) for each in value]
    if not is_dataclass(value):
        return value
    given = {
        field.name: getattr(value, field.name) for field in fields(value) if not _is_default(value, field)
    }
    return {name: chosen(each) for name, each in given.items()}


def _is_default(section: Any, field: Field[Any]) -> bool:
    value = getattr(section, field.name)
    if field.default is not MISSING:
        return bool(value == field.default)
    return field.default_factory is not MISSING and bool(value == field.default_factory())
