"""Which fields of a configuration say how a run is carried out, not what it computes: they may differ between its commands."""

from __future__ import annotations

import json
from typing import Any

HOW_IT_RUNS = (
    "launch",
    "backend",
    "continual.methods",
    "data.num_proc",
    "eval.batch_size",
    "probe.margin",
    "probe.unlearned",
    "target.trust_remote_code",
    "proxy.trust_remote_code",
    "train.activation_checkpointing",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.checkpoint_async",
    "train.checkpoint_keep",
    "train.log_every",
    "train.max_bad_steps",
    "train.micro_batch_size",
    "train.offload",
    "train.sequence_parallel",
    "train.spike_rollbacks",
    "train.trackers",
)
"""No result depends on them."""


def decisive(about: Any) -> Any:
    """What a result was made with, as JSON gives it back, without the fields of HOW_IT_RUNS.

    Args:
        about: name of a section -> its fields as plain values; whatever else a result depends on may stand beside them. A value
            of another kind, as damaged records hold, stays as it is.
    """
    plain = json.loads(json.dumps(about))
    if not isinstance(plain, dict):
        return plain
    return {name: _fields(name, value) for name, value in plain.items() if name not in HOW_IT_RUNS}


def _fields(section: str, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if f"{section}.{key}" not in HOW_IT_RUNS}
