"""Models: roles of parameters, tokenizers, loading (whole or sharded), conversion, pruning, identity."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.models.heads import head_rows
from trace_dist.models.roles import ParamInfo, Role, describe, full_shape, maskable

if TYPE_CHECKING:
    from trace_dist.models.gguf import convert_gguf
    from trace_dist.models.loading import load_model, load_model_zero3, load_tokenizer
    from trace_dist.models.prune import depth_prune
    from trace_dist.models.tiny import build_tiny
    from trace_dist.models.tokenizer import char_tokenizer

# Resolved on first use: they bring the architectures of transformers, and a command on a bank or a mask needs none.
_HOMES = {
    "build_tiny": "tiny",
    "char_tokenizer": "tokenizer",
    "convert_gguf": "gguf",
    "depth_prune": "prune",
    "load_model": "loading",
    "load_model_zero3": "loading",
    "load_tokenizer": "loading",
}
__all__ = [
    "ParamInfo",
    "Role",
    "build_tiny",
    "char_tokenizer",
    "check_same",
    "convert_gguf",
    "depth_prune",
    "describe",
    "fingerprint",
    "full_shape",
    "head_rows",
    "load_model",
    "load_model_zero3",
    "load_tokenizer",
    "maskable",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"trace_dist.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'trace_dist.models' has no attribute {name!r}")
