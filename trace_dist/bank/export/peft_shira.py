"""An adapter for PEFT's SHiRA: ``PeftModel.from_pretrained`` loads it, ``merge_and_unload()`` makes our weights of it exactly.

[Note: SHiRA] PEFT keeps of each linear layer ``shira_weight`` [n] fp32, differences to the base, and ``shira_indices`` [2, n]
int32, their rows and columns, where n = r (in + out) with one r for all layers (peft/tuners/shira/layer.py). A random mask is
drawn again from its seed; ``mask_type`` names another kind here, of which PEFT takes the indices from the file.

Differences are added in fp32, in the order of the file, and the sum is rounded to the dtype of the weights. One difference does
not reach every value: from 0.7 none leads to 0.001 exactly. An entry that it does not reach has two, the rounded difference and
the remainder. Every sum is computed here as PEFT will; what does not come out bit for bit is refused. Of bf16 weights both are
bf16 numbers, since PEFT rounds them so with ``low_cpu_mem_usage=True``. Entries that equal the base's are left out. What is left
of n repeats an index with a difference of -0.0, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trace_dist.bank.delta import Delta, check_dtype
from trace_dist.bank.export.card import write_card
from trace_dist.bank.export.folder import exported_folder
from trace_dist.bank.export.refusal import refuse
from trace_dist.bank.export.together import Composed, empty_base, together
from trace_dist.models.architecture import factory_of
from trace_dist.models.shared import shared_names
from trace_dist.sharding.build import load_sharded
from trace_dist.utils.files import check_free_space, write_json

label = "SHiRA adapter of PEFT"
same_dtype = True
CURE = "export it as hf or vllm-patch"
MASK_TYPE: Any = "stored"
"""Any name but PEFT's own ``random``: the indices are then those of the file."""
Entries = tuple[Tensor, Tensor]
"""Flat indices [n] int64 and differences [n] fp32."""


@dataclass(frozen=True)
class Options(Composed):
    """Of ``peft-shira``."""


def check(deltas: Sequence[Delta], base: str) -> None:
    """Raise ValueError unless all that the deltas change are the weights of linear layers."""
    if not deltas:
        raise ValueError("task: the base alone makes no adapter; name a task, or a delta")
    model = empty_base(base)
    names = dict.fromkeys(name for delta in deltas for name in delta.mask)
    refuse(
        "peft-shira",
        {name: why for name in names if (why := _unfit(model, name)) is not None},
        "SHiRA changes the weights of linear layers",
        CURE,
    )


def _unfit(model: nn.Module, name: str) -> str | None:
    """Why SHiRA cannot hold a parameter; None where it can."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return "not in the model"
    if type(module) is not nn.Linear:
        return f"of a {type(module).__name__}"
    if leaf != "weight":
        return f"a {leaf}"
    same = next((held for held in shared_names(model) if name in held), [name])
    other = next((each for each in same if each != name), None)
    return None if other is None else f"tied to {other}"


def write(deltas: Sequence[Delta], out: Path, base: str, dtype: str, options: Options) -> None:
    """Write the adapter of one delta, or of what several of them make together.

    Raises:
        ValueError: a value cannot be reached, or a layer holds more entries than SHiRA gives it.
    """
    from peft import ShiraConfig

    model = load_sharded(base, dtype)
    delta = together(deltas, model, options)
    if delta is None:
        raise AssertionError("no delta passed the check")
    entries = {}
    for name in delta.mask:
        check_dtype(delta, name, model.like(name).dtype)
        flat = delta.mask.elements(name)
        entries[name] = differences(name, flat, model.local(name)[flat].cpu(), delta.values[name])
    entries = {name: found for name, found in entries.items() if len(found[0])}
    if not entries:
        raise ValueError(f"delta {delta.task!r}: equals the base everywhere, so there is no adapter to write")
    shapes = {name: model.shape(name) for name in entries}
    rank = _rank(entries, shapes)
    modules = sorted(name.removesuffix(".weight") for name in entries)
    config = ShiraConfig(
        r=rank,
        mask_type=MASK_TYPE,
        target_modules=modules,
        inference_mode=True,
        base_model_name_or_path=base,
        # None is a model that PEFT wraps without methods of its own, such as a classifier.
        task_type="CAUSAL_LM" if factory_of(model.config) is AutoModelForCausalLM else None,
    )
    with exported_folder(out) as folder:
        check_free_space(folder, 12 * rank * sum(map(sum, shapes.values())))
        # PEFT would write the modules in no fixed order.
        write_json(folder / "adapter_config.json", {**config.to_dict(), "target_modules": modules})
        save_file(_tensors(entries, shapes, rank), folder / "adapter_model.safetensors", {"format": "pt"})
        used = sum(len(flat) for flat, _ in entries.values())
        facts = {"entries": sum(len(flat.unique()) for flat, _ in entries.values()), "slots": used}
        facts["padding"] = rank * sum(map(sum, shapes.values())) - used
        write_card(folder, "peft-shira", deltas, base, dtype, options, r=rank, **facts)


def differences(name: str, flat: Tensor, own: Tensor, tuned: Tensor) -> Entries:
    """What leads from the base's values to the tuned ones, exactly.

    Args:
        name: of the parameter, for the error.
        flat: [n] int64, the entries.
        own: [n], the base's values there.
        tuned: [n] in the same dtype.

    Returns:
        The entries that differ, each with its difference; then the remainders of those that one does not reach.

    Raises:
        ValueError: a value is not reached by two.
    """
    differs = _bits(own) != _bits(tuned)
    flat, own, tuned = flat[differs], own[differs], tuned[differs]
    first, rest = torch.zeros(len(flat)), torch.zeros(len(flat))
    open_ = torch.ones(len(flat), dtype=torch.bool)
    for kind in dict.fromkeys((tuned.dtype, torch.float32)):
        step = (tuned.float() - own.float()).to(kind).float()
        reached = own.float() + step
        remainder = (tuned.float() - reached).to(kind).float()
        one = _bits(reached.to(tuned.dtype)) == _bits(tuned)
        two = _bits((reached + remainder).to(tuned.dtype)) == _bits(tuned)
        first = torch.where(open_, step, first)
        rest = torch.where(open_, remainder.where(~one, 0.0), rest)
        open_ = open_ & ~(one | two)
    if bool(open_.any()):
        place = int(open_.nonzero()[0, 0])
        raise ValueError(
            f"peft-shira: {name}[{int(flat[place])}] is {tuned[place].item()!r}, which no sum of differences makes of the base's "
            f"{own[place].item()!r} ({int(open_.sum())} such entries); {CURE}"
        )
    more = rest != 0
    return torch.cat([flat, flat[more]]), torch.cat([first, rest[more]])


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


def _rank(entries: Mapping[str, Entries], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The r that gives every layer room. Raises ValueError where it is more than a layer has weights."""
    needed = {name: -(-len(flat) // sum(shapes[name])) for name, (flat, _) in entries.items()}
    most = {name: shapes[name][0] * shapes[name][1] // sum(shapes[name]) for name in entries}
    dense, small = max(needed, key=needed.__getitem__), min(most, key=most.__getitem__)
    if needed[dense] > most[small]:
        raise ValueError(
            f"peft-shira: SHiRA gives every layer r (in + out) entries with one r; {dense} needs r={needed[dense]} for its "
            f"{len(entries[dense][0])}, and {small} of shape {list(shapes[small])} allows r={most[small]} at most; {CURE}"
        )
    return needed[dense]


def _tensors(
    entries: Mapping[str, Entries], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, Tensor]:
    tensors = {}
    for name, (flat, values) in entries.items():
        room = rank * sum(shapes[name]) - len(flat)
        flat = torch.cat([flat, flat[:1].expand(room)])
        key, cols = f"base_model.model.{name.removesuffix('.weight')}", shapes[name][1]
        tensors[f"{key}.shira_weight"] = torch.cat([values, torch.full((room,), -0.0)])
        tensors[f"{key}.shira_indices"] = torch.stack([flat // cols, flat % cols]).to(torch.int32)
    return tensors
