"""Keys of earlier versions: what they are called now."""

from __future__ import annotations

import re

RENAMED = {
    "projection.pool_density": "projection.options.pool_density",
    "projection.narrow_steps": "projection.options.steps",
    "projection.narrow_lr": "projection.options.lr",
    "continual.modes": "continual.methods",
    "continual.replay": "continual.options.merged.replay",
    "continual.replay_memory": "continual.options.merged.replay_memory",
    "continual.full_lr": "continual.options.full.lr",
    "continual.lora_lr": "continual.options.lora.lr",
    "continual.lora_rank": "continual.options.lora.rank",
    "launch.launched_modes": "launch.single_process, which names the methods that shall not run on all ranks",
    "--exporter": "--format",
}


def explain(message: str) -> str:
    """An error of the parser; where it is about a key of an earlier version, the key's new name instead."""
    for old, new in RENAMED.items():
        if re.search(rf"(?<![\w.]){re.escape(old)}(?![\w.])", message):
            return f"{old}: the key has another name now; use {new}"
    return message
