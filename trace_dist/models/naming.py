"""Which tensors of a checkpoint make up each parameter of a model.

Mostly one, of the same name. But checkpoints of base models lack a prefix, older ones use older names, and
those of experts models store every expert apart while the module fuses them. transformers knows these rules;
here they are applied to names alone, so that any interval of a parameter can be read without building it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

Pieces = dict[str, list[str]]
"""Name in the module -> names in the checkpoint, whose values laid end to end are the parameter's."""

RESAVE = "load it once with transformers and save_pretrained(..., save_original_format=False)"
"""The cure for a checkpoint whose layout is not the module's."""


def pieces_of(model: PreTrainedModel, names: Iterable[str]) -> Pieces:
    """Match a checkpoint's names with a model's parameters and persistent buffers.

    Names that belong to nothing in the model are left out.

    Args:
        model: the module, sharded or not.
        names: names in the checkpoint.

    Raises:
        ValueError: a parameter is made from several tensors in a way other than laying them end to end.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known = dict.fromkeys(model.state_dict(), torch.empty(0, device="meta"))
    parts: dict[str, dict[str | None, list[str]]] = {}  # target -> converter's source pattern -> names
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:  # a rule meant for others, as from_pretrained takes it
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, known)
        if target in known:
            parts.setdefault(target, {}).setdefault(pattern, []).append(name)
    pieces = {}
    for target, by_pattern in parts.items():
        rule = next((converter_of[pattern] for pattern in by_pattern if pattern is not None), None)
        ordered = list(by_pattern[None]) if rule is None else _end_to_end(rule, by_pattern)
        if ordered is None or (rule is None and len(ordered) > 1):
            raise ValueError(f"{target}: this layout on disk cannot be read in parts; {RESAVE}")
        pieces[target] = ordered
    return pieces


def _end_to_end(rule: WeightConverter, by_pattern: dict[str | None, list[str]]) -> list[str] | None:
    """The sources in the order that makes the parameter, laid end to end; None where no order does.

    Stacking the matrices of each pattern along dim 0 and joining the stacks along dim 1 gives, in row-major
    order, expert after expert and pattern after pattern. Joining one tensor of each pattern along dim 0 lays them end to end too.
    """
    joins = [(type(op), op.dim) for op in rule.operations if isinstance(op, MergeModulelist | Concatenate)]
    if len(joins) != len(rule.operations) or len(rule.target_patterns) != 1:
        return None
    lists = [by_pattern.get(pattern, []) for pattern in rule.source_patterns]
    if joins == [(Concatenate, 0)] and all(len(names) == 1 for names in lists):
        return [name for names in lists for name in names]
    if joins != [(MergeModulelist, 0), (Concatenate, 1)][: len(joins)] or not joins:
        return None
    if len({len(names) for names in lists}) != 1 or (len(joins) == 1 and len(lists) > 1):
        return None
    return [name for expert in zip(*lists, strict=True) for name in expert]
