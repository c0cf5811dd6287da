"""A proxy made from its target: a copy that keeps evenly spaced decoder layers, and of each some channels, heads and neurons.

Works on the files, tensor by tensor: the target is never loaded, and only what is kept is read. What was kept is written beside
the copy (models/origin.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from trace_dist.models.architecture import empty_model, read_config
from trace_dist.models.depth import check_layers, layer_list, refusal, shortened
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.naming import pieces_of
from trace_dist.models.narrower import Narrower
from trace_dist.models.origin import Origin
from trace_dist.models.rest import copy_rest
from trace_dist.models.trust import is_trusted, trust
from trace_dist.models.weight_files import WeightFiles, open_weights
from trace_dist.models.width import Widths
from trace_dist.utils.files import atomic_folder

WHOLE = Widths()


def kept_layers(num_layers: int, keep_layers: int) -> list[int]:
    """Indices of the layers that stay: evenly spaced, with the first and the last; the first alone for 1."""
    if keep_layers == 1:
        return [0]
    return [round(i * (num_layers - 1) / (keep_layers - 1)) for i in range(keep_layers)]


def depth_prune(source: Path, keep_layers: int, out: Path) -> None:
    """``prune`` of layers alone."""
    prune(source, out, keep_layers)


def evenly_cut(model: Any, keep_layers: int, target: str) -> Origin:
    """The origin of a copy of whole layers, for copies of earlier releases, which keep none.

    Args:
        model: the target.
        keep_layers: layers of the copy.
        target: fingerprint of the model.

    Raises:
        ValueError: the model has no one list of layers, or fewer.
    """
    stack, num_layers = layer_list(model, model.config), model.config.get_text_config().num_hidden_layers
    if stack is None or keep_layers > num_layers:
        raise ValueError(
            f"prune.keep_layers={keep_layers}: no copy of so many layers was cut out of this target, which has {num_layers}; "
            "delete the proxy to have it made again"
        )
    return Origin(target, stack, kept_layers(num_layers, keep_layers))


def prune(source: Path, out: Path, keep_layers: int | None = None, widths: Widths = WHOLE) -> None:
    """Write a copy of a checkpoint that has only some of its decoder layers, renumbered, or narrower ones.

    Args:
        source: checkpoint folder of a causal LM whose decoder layers are one list.
        out: the new folder, with the tokenizer; appears only when complete. It may run the code that ``source`` may.
        keep_layers: how many layers to keep; all when None.
        widths: what to keep of each.

    Raises:
        ValueError: more than there is, ``out`` exists already, or a family whose layers depend on their index or on each other in
            a way that fewer layers cannot have, or are no dense layers with separate query, key and value weights where they
            shall be narrower.
    """
    what = f"model.path={str(source)!r}"

    def build(config: Any) -> Any:
        return empty_model(config, torch.float32, what)

    with open_weights(source) as files, atomic_folder(out) as folder:
        config = read_config(files.folder, what)
        model = build(config)
        stack = layer_list(model, config)
        if stack is None:
            raise ValueError(refusal(config, "its decoder layers are not one list"))
        num_layers = config.get_text_config().num_hidden_layers
        keep_layers = num_layers if keep_layers is None else keep_layers
        if not 1 <= keep_layers <= num_layers:
            raise ValueError(
                f"prune.keep_layers={keep_layers}: the model has {num_layers} layers; keep 1 to {num_layers}"
            )
        kept = kept_layers(num_layers, keep_layers)
        pruned_config = shortened(config, kept)
        pruned = check_layers(build, config, pruned_config, kept)
        pieces = pieces_of(model, files.names())
        names = _renumbered(pieces, stack, kept)
        _check(pruned, config, files, names)
        origin = Origin(fingerprint(source), stack, kept)
        read: Callable[[str], Tensor] = files.tensor
        if widths:
            narrow = Narrower(config, model, files, pieces, origin, widths)
            origin = narrow.origin
            pruned_config = narrow.config(pruned_config)
            read = narrow.reader(build, pruned_config, names)
        copy_rest(files.folder, folder)
        pruned_config.save_pretrained(folder)
        save_torch_state_dict({new: read(old) for new, old in names.items()}, folder)
        origin.save(folder)
    if is_trusted(files.folder):
        trust(out)


def _renumbered(pieces: dict[str, list[str]], stack: str, kept: list[int]) -> dict[str, str]:
    """Name in the pruned files -> name in the files, of every tensor that stays. What belongs to nothing in the model goes."""
    # The list of layers is the first that a name numbers, whatever the file calls it.
    place = re.compile(r"(?:^|\.)(\d+)\.")
    names = {}
    for parameter, stored in pieces.items():
        within = re.match(rf"{re.escape(stack)}\.(\d+)\.", parameter)
        for old in stored:
            if within is None:
                names[old] = old
            elif (
                int(within[1]) in kept and (found := place.search(old)) is not None and found[1] == within[1]
            ):
                names[f"{old[: found.start(1)]}{kept.index(int(within[1]))}{old[found.end(1) :]}"] = old
    return names


def _check(pruned: Any, config: Any, files: WeightFiles, names: dict[str, str]) -> None:
    """Raise ValueError unless the tensors that stay are what the pruned model needs, in size too."""
    pieces = pieces_of(pruned, names)
    tied = set(pruned.all_tied_weights_keys)
    for name, parameter in pruned.named_parameters():
        if name not in pieces and name not in tied:
            raise ValueError(refusal(config, f"renumbered layers do not fit ({name} is missing)"))
        found = sum(math.prod(files.shape(names[piece])) for piece in pieces.get(name, ()))
        if name in pieces and found != parameter.numel():
            raise ValueError(refusal(config, f"{name} has {found} elements, not {parameter.numel()}"))
