"""trace_dist: continual fine-tuning of large causal LMs with probed, projected masks inside ZeRO-3 shards."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_dist.bank.bank import DeltaBank
    from trace_dist.bank.delta import Delta
    from trace_dist.masks.mask import Mask
    from trace_dist.models.nf4 import quantize_nf4
    from trace_dist.optim.masked_adamw import MaskedAdamW
    from trace_dist.serving.router import Router
    from trace_dist.sharding.build import load_sharded, shard

    __version__: str

# Resolved on first use, so that the command line answers before torch is loaded.
_HOMES = {
    "Delta": "bank.delta",
    "DeltaBank": "bank.bank",
    "Mask": "masks.mask",
    "MaskedAdamW": "optim.masked_adamw",
    "Router": "serving.router",
    "load_sharded": "sharding.build",
    "quantize_nf4": "models.nf4",
    "shard": "sharding.build",
}
__all__ = ["Delta", "DeltaBank", "Mask", "MaskedAdamW", "Router", "load_sharded", "quantize_nf4", "shard"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # pyproject.toml alone states it

        return version("trace-dist")
    if name in _HOMES:
        return getattr(import_module(f"trace_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trace_dist' has no attribute {name!r}")
