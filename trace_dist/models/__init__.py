"""Models: roles of parameters, tokenizers, loading (whole or sharded), conversion, pruning, identity."""

from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.models.gguf import convert_gguf
from trace_dist.models.heads import head_rows
from trace_dist.models.loading import load_model, load_model_zero3, load_tokenizer
from trace_dist.models.prune import depth_prune
from trace_dist.models.roles import ParamInfo, Role, describe, full_shape, maskable
from trace_dist.models.tiny import build_tiny
from trace_dist.models.tokenizer import char_tokenizer

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
