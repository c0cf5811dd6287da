"""Checkpoints of ordinary training (full fine-tuning, LoRA): parameters and the optimizer's states by name.

Rank 0's file has ``<param>/values`` and ``<param>/<key>`` for every tensor that the optimizer keeps of a parameter (of AdamW
``step``, ``exp_avg``, ``exp_avg_sq``), and, where it was given, ``<param>/best``, the values of an earlier step. Several ranks
train the same values, so the others' files have their random state alone. A resumed run repeats the uninterrupted one bit for
bit, dropout included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.checkpoint.format import BEST, MANIFEST, damaged, open_files, rank_file, read_checked
from trace_dist.checkpoint.random_state import check_random_state, restore_random_state
from trace_dist.checkpoint.retention import KEEP
from trace_dist.checkpoint.writer import Contents, Write, write_checkpoint
from trace_dist.utils import dist
from trace_dist.utils.files import MALFORMED
from trace_dist.utils.together import on_all

VALUES = "values"
Named = Iterable[tuple[str, nn.Parameter]]


def save_dense(
    root: Path,
    step: int,
    named_parameters: Named,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int = KEEP,
    best: Mapping[str, Tensor] | None = None,
    write: Write = write_checkpoint,
) -> Path:
    """Write a checkpoint and drop older ones. Collective.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done.
        named_parameters: what is trained, as ``module.named_parameters()`` gives it.
        optimizer: over these parameters, all of them or some; its states are tensors, as those of torch's optimizers.
        state: JSON-ready state of everything else (schedule, data position).
        keep: checkpoints that stay in ``root``, this one among them.
        best: parameter -> its values at an earlier step, to be kept beside the present ones.
        write: what writes: at once, or ``Background.save``.

    Raises:
        ValueError: a value is not finite, the optimizer has a parameter without a name, or the disk has no room; the older
            checkpoints are then still there.
    """
    named = dict(named_parameters)
    groups = _groups(named, optimizer)
    tensors: dict[str, Tensor] = {}
    if dist.is_main():
        for name, parameter in named.items():
            tensors[f"{name}/{VALUES}"] = parameter.detach()
            kept = optimizer.state.get(parameter, {})
            tensors |= {f"{name}/{key}": torch.as_tensor(value) for key, value in kept.items()}
            if best is not None:
                tensors[f"{name}/{BEST}"] = best[name]
    facts = {"groups": groups} | ({} if best is None else {BEST: True})
    return write(root, step, Contents("dense", tensors, facts=facts), state, keep)


def load_dense(folder: Path, named_parameters: Named, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore parameters, optimizer states and rates, and the random state on the same number of ranks. Collective.

    Args:
        folder: what ``save_dense`` wrote.
        named_parameters: of the same names, shapes and dtypes as were saved.
        optimizer: over the same parameters, in the same groups.

    Returns:
        The manifest; ``manifest["state"]`` is what ``save_dense`` was given, ``manifest["step"]`` the steps done.

    Raises:
        ValueError: not a checkpoint of these parameters, or a damaged file; nothing has been loaded then.
    """
    manifest = read_checked(folder, "dense")
    named = dict(named_parameters)
    files = open_files(folder, manifest["files"])
    keys = on_all(lambda: _keys(folder, manifest, named, optimizer, files[rank_file(0)]))
    on_all(lambda: check_random_state(folder, files))
    main = files[rank_file(0)]
    numbers = {name: index for index, name in enumerate(n for g in manifest["groups"] for n in g["params"])}
    # Copies: what safetensors gives is a map of the file.
    states = {
        number: {key: main.get_tensor(f"{name}/{key}").clone() for key in keys[name]}
        for name, number in numbers.items()
        if keys[name]
    }
    groups = [
        {**present, **_options(saved, present), "params": [numbers[name] for name in saved["params"]]}
        for saved, present in zip(manifest["groups"], optimizer.param_groups, strict=True)
    ]
    try:
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    # A state that this optimizer cannot work with.
    except MALFORMED:
        raise damaged(folder / rank_file(0)) from None
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(main.get_tensor(f"{name}/{VALUES}"))
    restore_random_state(files)
    return manifest


def load_best_dense(
    folder: Path, manifest: dict[str, Any], named_parameters: Named
) -> dict[str, Tensor] | None:
    """The values that ``save_dense`` was given as ``best``; None where it was given none. Collective.

    Args:
        folder: the checkpoint.
        manifest: what ``load_dense`` gave, which has checked the files.
        named_parameters: as there.
    """
    if not manifest.get(BEST):
        return None
    main = open_files(folder, [rank_file(0)])[rank_file(0)]
    return {name: main.get_tensor(f"{name}/{BEST}").clone() for name, _ in named_parameters}


def _groups(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's groups: names and what is a number in them (rates, betas), JSON-ready."""
    names = {id(parameter): name for name, parameter in named.items()}
    groups = []
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ValueError(
                "named_parameters: the optimizer has a parameter that is not among them; name all that it trains"
            )
        numbers = {key: _plain(value) for key, value in group.items() if key != "params"}
        params = [names[id(parameter)] for parameter in group["params"]]
        groups.append({**{k: v for k, v in numbers.items() if v is not None}, "params": params})
    return groups


def _plain(value: Any) -> Any:
    """A number, or numbers in a list; None for anything else (how the step is run is the present optimizer's affair)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, tuple | list):
        numbers = [_plain(each) for each in value]
        return None if None in numbers else numbers
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_option(saved: Any, present: Any) -> bool:
    """Whether a saved value is a finite number where the present one is a number, or as many of them."""
    if isinstance(present, tuple | list):
        numbers = isinstance(saved, list) and len(saved) == len(present)
        return numbers and all(map(_is_option, saved, present))
    return isinstance(saved, int | float) and not isinstance(saved, bool) and abs(saved) < math.inf


def _options(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    """The saved numbers of a group, in the types of the present one."""
    return {
        key: tuple(value) if isinstance(present.get(key), tuple) else value
        for key, value in saved.items()
        if key != "params"
    }


def _keys(folder: Path, manifest: dict[str, Any], *present: Any) -> dict[str, list[str]]:
    """As ``_check``, whatever types the manifest and the file hold."""
    try:
        return _check(folder, manifest, *present)
    except ValueError:
        raise
    except MALFORMED:
        raise damaged(folder / rank_file(0)) from None


def _check(
    folder: Path,
    manifest: dict[str, Any],
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    main: Any,
) -> dict[str, list[str]]:
    """The optimizer's keys in the file by parameter; raises ValueError where it is not of these parameters."""
    keys: dict[str, list[str]] = {}
    best: set[str] = set()
    for entry in main.keys():  # noqa: SIM118 - not a mapping
        name, _, key = entry.rpartition("/")
        if key == BEST and manifest.get(BEST):
            best.add(name)
        elif name != "random":
            keys.setdefault(name, []).append(key)
    groups = manifest.get("groups")
    if not isinstance(groups, list) or not all(isinstance(g, dict) and "params" in g for g in groups):
        raise damaged(folder / MANIFEST)
    other = f"{folder}: the checkpoint is of other parameters"
    for name in sorted(keys.keys() ^ named.keys()):
        where = "not in the checkpoint" if name in named else "only in the checkpoint"
        raise ValueError(f"{other} ({name!r} is {where}); give the model that it was saved from")
    for name, parameter in named.items():
        stored = main.get_tensor(f"{name}/{VALUES}")
        if (stored.shape, stored.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{other} ({name!r} is {stored.dtype} {tuple(stored.shape)} there, {parameter.dtype} "
                f"{tuple(parameter.shape)} here); give the model that it was saved from"
            )
        if manifest.get(BEST):
            kept = main.get_slice(f"{name}/{BEST}") if name in best else None
            if kept is None or kept.get_shape() != list(parameter.shape):
                raise damaged(folder / rank_file(0))
        shapes = [main.get_slice(f"{name}/{key}").get_shape() for key in keys[name]]
        if any(shape not in ([], list(parameter.shape)) for shape in shapes):
            raise damaged(folder / rank_file(0))
    if len({frozenset(found) for found in keys.values() if found != [VALUES]}) > 1:
        raise damaged(folder / rank_file(0))
    if [g["params"] for g in groups] != [g["params"] for g in _groups(named, optimizer)]:
        raise ValueError(f"{folder}: its optimizer has other parameter groups; build the same groups")
    for saved, present in zip(groups, optimizer.param_groups, strict=True):
        if not all(_is_option(saved[key], present.get(key)) for key in saved.keys() - {"params"}):
            raise damaged(folder / MANIFEST)
    return {name: [key for key in found if key != VALUES] for name, found in keys.items()}
