"""The target of a run, loaded."""

from __future__ import annotations

from pathlib import Path

from trace_dist.config import Backend, ModelConfig
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import load_sharded
from trace_dist.train.slow_dtype import hint_at_slow_dtype


def base_path(model: ModelConfig) -> Path | str:
    """Folder or hub id that a base model is loaded from."""
    folder = Path(model.path)
    return folder if model.made or (folder / "config.json").is_file() else model.path


def load_target(target: ModelConfig, backend: Backend, sequence_parallel: int = 1) -> ShardedModel:
    """The target in its data type, 4-bit where asked for, on a backend; so many ranks share rows. Collective.

    Raises:
        ValueError: it cannot be loaded.
    """
    model = load_sharded(str(base_path(target)), target.dtype, backend, target.quantize, sequence_parallel)
    hint_at_slow_dtype(model, "target.dtype")
    return model
