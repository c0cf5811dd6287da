"""The unit layouts of a model's parameters."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trace_dist.config.granularity import Granularities
from trace_dist.masks.tied import PARTS, Tied
from trace_dist.masks.units import UnitLayout, unit_layout
from trace_dist.models.heads import head_rows
from trace_dist.models.quantised import refuse_quantised_module
from trace_dist.models.roles import describe, maskable
from trace_dist.models.wrapping import unwrap


def layouts_for(model: Any, granularity: str, block: int, maskable_spec: str) -> dict[str, UnitLayout]:
    """Unit layouts of a model's maskable parameters; parameters without elements have none.

    Args:
        model: a transformers model, whatever wraps it, or a sharded model.
        granularity: element, block, row, column, head, neuron or tensor; of some roles another one, as in
            ``row,q=head,down=column``.
        block: elements per unit for block.
        maskable_spec: ``linear``, ``all`` or a regular expression (``models.roles.maskable``).

    Raises:
        ValueError: no such granularity; nothing is maskable; another library has quantised the weights; for ``head``, the size of
            a weight's heads is not known; for ``neuron``, which parts of an MLP make one.
    """
    module: Any = unwrap(model if isinstance(model, nn.Module) else getattr(model, "module", model))
    refuse_quantised_module(module)
    infos = describe(module)
    kinds = Granularities.parse(granularity)
    # A Conv1D keeps its weight as [in, out] ([Note: weight layout] in models/roles.py).
    turned = {f"{name}.weight" for name, each in module.named_modules() if isinstance(each, Conv1D)}

    def layout(name: str) -> UnitLayout:
        info = infos[name]
        kind = kinds.of(info.role)
        if kinds.neurons and info.role in PARTS and name in turned:
            kind = "row" if kind == "column" else "column"
        return unit_layout(info.shape, kind, block, head_rows(module, info) if kind == "head" else None)

    found = {name: layout(name) for name in maskable(module, maskable_spec) if prod(infos[name].shape)}
    Tied.of(found, granularity, getattr(getattr(module, "config", None), "model_type", type(module).__name__))
    return found
