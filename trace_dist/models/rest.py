"""What lies beside a model's weights: its tokenizer or image processor, settings, and Python code of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from trace_dist.models.origin import FILE
from trace_dist.models.trust import is_trusted

CARD = "trace_dist.json"
"""What an exported folder says of itself."""
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps chat templates beside the default one."""
_OWN = {"config.json", FILE, CARD}


def copy_rest(source: Path, folder: Path) -> None:
    """Copy everything but weights, their index, the config, and what is said of the copy's making.

    Args:
        source: folder of a checkpoint; its Python code is copied where it may run.
        folder: is there already.
    """
    wanted = _SUFFIXES | ({".py"} if is_trusted(source) else set())
    for file in source.iterdir():
        if file.suffix in wanted and not (file.name in _OWN or file.name.endswith(".index.json")):
            shutil.copyfile(file, folder / file.name)
    for file in source.glob(f"{_TEMPLATES}/*.jinja"):
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / _TEMPLATES / file.name)
