"""A sparse patch in vLLM's form: absolute values at flat indices of checkpoint tensors.

vLLM's ``CheckpointWeightPatch`` (vllm/model_executor/model_loader/checkpoint_weight_patch.py) has ``name``, ``shape``, ``dtype``,
``values`` and ``indices``, all of the *checkpoint's* tensor; the model's own ``load_weights`` finds its place in fused weights
such as ``qkv_proj`` and in the shards of tensor and expert parallelism. NaN stands for "unchanged" there.

    patch.safetensors   ``<name>.indices`` [n] int32 (int64 for tensors of 2^31 elements), rising, ``<name>.values`` [n]
    undo.safetensors    the same entries with the base's values: a patch is written in place, and this takes it off again
    update_info.json    ``names``, ``dtype_names``, ``shapes``, ``num_updates_list``, as vLLM's ``update_weights`` takes them

The names of the tensors are those of TRL's delta files. What our model fuses and the checkpoint keeps apart, such as experts, is
cut where the checkpoint cuts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trace_dist.bank.delta import Delta, check_dtype
from trace_dist.bank.export.card import write_card
from trace_dist.bank.export.folder import exported_folder
from trace_dist.bank.export.refusal import refuse
from trace_dist.bank.export.together import Composed, dtypes_of, empty_base, together
from trace_dist.models.naming import pieces_of
from trace_dist.models.weight_files import WeightFiles, open_weights
from trace_dist.sharding.build import load_sharded
from trace_dist.utils.files import check_free_space, write_json

label = "sparse patch of vLLM"
same_dtype = True
CURE = "export it as hf"
PATCH, UNDO, INFO = "patch.safetensors", "undo.safetensors", "update_info.json"
REWRITTEN = frozenset({"A_log"})
"""What vLLM's loaders compute with while they load (``composed_weight_loader``): they refuse patches of it."""


@dataclass(frozen=True)
class Options(Composed):
    """Of ``vllm-patch``."""


@dataclass(frozen=True)
class Patch:
    """New values of one checkpoint tensor.

    Attributes:
        name: of the tensor in the checkpoint.
        shape: of the whole.
        indices: [n] int32 or int64, flat, rising.
        values: [n] tuned values.
    """

    name: str
    shape: tuple[int, ...]
    indices: Tensor
    values: Tensor


def check(deltas: Sequence[Delta], base: str) -> None:
    """Raise ValueError where a parameter has no place in the checkpoint, or vLLM's loaders do not take patches of it."""
    if not deltas:
        raise ValueError("task: the base alone makes no patch; name a task, or a delta")
    with open_weights(base) as files:
        pieces = pieces_of(empty_base(base), files.names())
    unfit = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.mask):
        if name.rpartition(".")[2] in REWRITTEN:
            unfit[name] = "which vLLM computes from the checkpoint's"
        elif name not in pieces:
            unfit[name] = "not in the checkpoint under this name"
    refuse("vllm-patch", unfit, "a patch changes tensors that the checkpoint and vLLM both have", CURE)
    for delta in deltas:
        _check_numbers(delta)


def _check_numbers(delta: Delta) -> None:
    for name, values in delta.values.items():
        if bool(values.isnan().any()):
            raise ValueError(
                f"vllm-patch: {name} of delta {delta.task!r} holds NaN, which means unchanged; {CURE}"
            )


def write(deltas: Sequence[Delta], out: Path, base: str, dtype: str, options: Options) -> None:
    """Write the patch of one delta, or of what several of them make together, and its undoing.

    Raises:
        ValueError: the deltas are of another dtype than asked for, or the patch cannot be written.
    """
    delta = deltas[0]
    if len(deltas) > 1:
        delta = together(deltas, load_sharded(base, dtype), options) or delta
        _check_numbers(delta)
    model = empty_base(base, dtype)
    dtypes = dtypes_of(model)
    for name in delta.mask:
        check_dtype(delta, name, dtypes[name])
    with open_weights(base) as files:
        pieces = pieces_of(model, files.names())
        patches = [each for name in sorted(delta.mask) for each in _cut(delta, name, pieces[name], files)]
        undone = {each.name: _own(each, files) for each in patches}
    info: dict[str, list[Any]] = {
        "names": [each.name for each in patches],
        "dtype_names": [str(each.values.dtype).removeprefix("torch.") for each in patches],
        "shapes": [list(each.shape) for each in patches],
        "num_updates_list": [len(each.indices) for each in patches],
    }
    # One key: safetensors writes several in no fixed order.
    metadata = {"changed_params": json.dumps(info["names"])}
    with exported_folder(out) as folder:
        check_free_space(folder, 2 * sum(each.indices.nbytes + each.values.nbytes for each in patches))
        for file, values in ((PATCH, {each.name: each.values for each in patches}), (UNDO, undone)):
            tensors = {f"{each.name}.indices": each.indices for each in patches}
            tensors |= {f"{name}.values": held for name, held in values.items()}
            save_file(tensors, folder / file, metadata)
        write_json(folder / INFO, info)
        entries = sum(info["num_updates_list"])
        write_card(folder, "vllm-patch", deltas, base, dtype, options, entries=entries)


def _cut(delta: Delta, name: str, pieces: Sequence[str], files: WeightFiles) -> Iterator[Patch]:
    """A parameter's entries as patches of the checkpoint tensors that, laid end to end, make it."""
    flat, values, start = delta.mask.elements(name), delta.values[name], 0
    for piece in pieces:
        shape = files.shape(piece)
        stop = start + math.prod(shape)
        first, last = torch.searchsorted(flat, torch.tensor([start, stop])).tolist()
        if last > first:
            index = torch.int32 if math.prod(shape) < 2**31 else torch.int64
            indices = (flat[first:last] - start).to(index)
            yield Patch(piece, shape, indices, values[first:last].clone())
        start = stop


def _own(patch: Patch, files: WeightFiles) -> Tensor:
    """What the base holds at a patch's entries, in the dtype of the patch."""
    return files.tensor(patch.name).reshape(-1)[patch.indices.long()].to(patch.values.dtype)
