"""Weights quantised by others (bitsandbytes, GPTQ, AWQ, fp8, MXFP4, ...) are refused: their codes have no entries to train.

Ours (``quantize='nf4'``, models/nf4.py) are made from plain weights while these are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trace_dist.utils.files import read_json

_CURE = "give a checkpoint in bfloat16 or float32 (quantize: nf4 makes 4-bit codes of one)"
_SECTIONS = ("quantization_config", "compression_config", "quantization")
# Beside the config, by the libraries that do not write into it.
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quanto_qmap.json": "quanto",
    "hf_quant_config.json": "modelopt",
}
_PLAIN = frozenset({"F16", "BF16", "F32", "F64"})
# Integers that stand for weights; positions, counts and attention masks are integers or booleans too.
_CODES = re.compile(r"weight|codes|codebook|packed|blocks|[qQ]zeros|W_q|absmax|SCB")
_LIBRARIES = frozenset(
    {
        *(
            "bitsandbytes",
            "gptqmodel",
            "auto_gptq",
            "awq",
            "hqq",
            "optimum",
            "quanto",
            "eetq",
            "aqlm",
            "torchao",
        ),
        *("compressed_tensors", "vptq", "quark", "spqr_quant"),
    }
)


def refuse_quantised_config(folder: Path, what: str) -> None:
    """Raise ValueError if a checkpoint folder says that its weights are quantised; reads JSON alone."""
    refuse_quantised_sections(read_json(folder / "config.json"), what)
    for file, method in _SIDE_FILES.items():
        if (folder / file).is_file():
            raise ValueError(f"{what}: its weights are quantised ({method}: it holds a {file}); {_CURE}")


def refuse_quantised_sections(config: Any, what: str) -> None:
    """Raise ValueError if a config, as JSON, says that its model's weights are quantised; ``what`` begins the message."""
    for section in _sections(config):
        method = section.get("quant_method") or "a quantization_config"
        raise ValueError(f"{what}: its weights are quantised ({method}); {_CURE}")


def _sections(config: Any) -> Iterator[Mapping[str, Any]]:
    """Quantisation sections of a config and of the configs within it."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            if isinstance(value, Mapping) and value:
                if name in _SECTIONS:
                    yield value
                else:
                    yield from _sections(value)


def refuse_quantised_tensors(dtypes: Mapping[str, str], what: str) -> None:
    """Raise ValueError if stored tensors hold codes.

    Args:
        dtypes: tensor -> its type as safetensors headers name it, such as ``BF16`` or ``F8_E4M3``.
        what: begins the message.
    """
    for name, dtype in dtypes.items():
        leaf = name.rpartition(".")[2]
        codes = dtype != "BOOL" and _CODES.search(leaf) is not None
        if dtype not in _PLAIN and (dtype.startswith("F") or codes):
            raise ValueError(f"{what}: its weights are quantised ({name} is stored as {dtype}); {_CURE}")


def refuse_quantised_module(model: nn.Module) -> None:
    """Raise ValueError if another library keeps quantised weights in a model, or in one that it wraps (PEFT)."""
    for path, module in model.named_modules():
        if getattr(module, "is_quantized", False):
            method = getattr(module, "quantization_method", None)
            raise ValueError(
                f"model: its weights are quantised ({getattr(method, 'value', method)}); {_CURE}"
            )
        for leaf, tensor in module.named_parameters(recurse=False):
            kind = type(tensor.data).__module__.partition(".")[0]
            library = _LIBRARIES & {type(module).__module__.partition(".")[0], kind}
            of_bytes = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
            if of_bytes or (library and leaf == "weight"):
                how = next(iter(library), tensor.dtype)
                raise ValueError(f"model: its weights are quantised ({path}.{leaf}: {how}); {_CURE}")
