"""A proxy made from its target: a copy that keeps evenly spaced decoder layers.

Works on the files, layer by layer: the target is never loaded, and only what is kept is read.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.models.naming import pieces_of
from trace_dist.models.weight_files import WeightFiles, open_weights
from trace_dist.utils.files import atomic_folder

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Entries of a config that hold one value per layer. Others that depend on the layer's index make the pruned
# model differ in its parameters' names, which is checked.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_OTHER_FILES = {".json", ".txt", ".model", ".jinja"}


def kept_layers(num_layers: int, keep_layers: int) -> list[int]:
    """Indices of the layers that stay: evenly spaced, with the first and the last; the first alone for 1."""
    if keep_layers == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep_layers - 1)) for i in range(keep_layers)]


def depth_prune(source: Path, keep_layers: int, out: Path) -> None:
    """Write a copy of a checkpoint that has only some of its decoder layers, renumbered.

    Args:
        source: checkpoint folder of a Llama-like model (its layers are ``model.layers``).
        keep_layers: how many layers to keep.
        out: the new folder, with the tokenizer; appears only when complete.

    Raises:
        ValueError: more layers than there are, another architecture, or ``out`` exists already.
    """
    with open_weights(source) as files, atomic_folder(out) as folder:
        config = AutoConfig.from_pretrained(files.folder)
        num_layers = getattr(config, "num_hidden_layers", None)
        if num_layers is None or not any(_LAYER.match(name) for name in files.names()):
            raise ValueError(
                f"prune: {config.model_type} keeps its layers elsewhere than in model.layers; use a smaller "
                "model of the family as the proxy"
            )
        if not 1 <= keep_layers <= num_layers:
            raise ValueError(
                f"prune.keep_layers={keep_layers}: the model has {num_layers} layers; keep 1 to {num_layers}"
            )
        kept = kept_layers(num_layers, keep_layers)
        _shorten(config, kept)
        names = {name: renamed for name in files.names() if (renamed := _renumber(name, kept)) is not None}
        _check(config, list(names.values()))
        _copy_rest(files, folder)
        config.save_pretrained(folder)
        state = {renamed: files.tensor(name) for name, renamed in names.items()}
        save_torch_state_dict(state, folder)


def _shorten(config: Any, kept: list[int]) -> None:
    """Adapt a config to the layers that stay, in place."""
    num_layers = config.num_hidden_layers
    for name in _PER_LAYER:
        values = getattr(config, name, None)
        if isinstance(values, list) and len(values) == num_layers:
            setattr(config, name, [values[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _renumber(name: str, kept: list[int]) -> str | None:
    """A tensor's name in the pruned model; None where its layer goes."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer = int(match[1])
    return f"model.layers.{kept.index(layer)}.{name[match.end() :]}" if layer in kept else None


def _check(config: Any, names: list[str]) -> None:
    """The pruned tensors must be what the pruned config builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    wanted = {name for name, _ in model.named_parameters()} - tied
    odd = sorted(wanted - set(pieces_of(model, names)))
    if odd:
        raise ValueError(
            f"prune: {config.model_type} builds layers by their index, so that renumbered ones do not fit "
            f"({odd[0]} is missing); use a smaller model of the family as the proxy"
        )


def _copy_rest(files: WeightFiles, folder: Path) -> None:
    """Copy the tokenizer and the generation config: everything but weights, their index and the config."""
    for file in files.folder.iterdir():
        if file.suffix in _OTHER_FILES and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
