"""The drop-in parts that a configuration names: one row each, ``name -> module`` ([Note: drop-in parts] in utils/registry.py).

The rows lie below the configuration, which checks names against them and imports no part.
"""

from __future__ import annotations

from trace_dist.utils.registry import Registry

METHODS = Registry(
    "continual.methods",
    {
        name: f"trace_dist.continual.methods.{name}"
        for name in ("retrieved", "merged", "random", "full", "lora")
    },
)
