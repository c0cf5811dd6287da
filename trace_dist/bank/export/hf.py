"""An ordinary Hugging Face checkpoint: the base model with the delta in its weights, and what lies beside the base's own.

The delta goes into weights of its own dtype, and the sum is rounded to the one that is asked for. What the family keeps in
fp32 beside that stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trace_dist.bank.delta import Delta, applied
from trace_dist.bank.export.card import write_card
from trace_dist.bank.export.folder import exported_folder
from trace_dist.bank.export.together import Composed, dtypes_of, empty_base, held_dtypes, together
from trace_dist.models.kinds import torch_dtype
from trace_dist.models.rest import copy_rest
from trace_dist.models.weight_files import resolve
from trace_dist.sharding.build import load_sharded
from trace_dist.sharding.saving import write_files
from trace_dist.utils.files import check_free_space

label = "Hugging Face checkpoint"


@dataclass(frozen=True)
class Options(Composed):
    """Of ``hf``."""


def write(deltas: Sequence[Delta], out: Path, base: str, dtype: str, options: Options) -> None:
    """Write the base with one delta, or with what several of them make together; without any, the base itself.

    Raises:
        ValueError: it cannot be written; what lay in ``out`` is then still there.
    """
    held = held_dtypes(deltas)
    check_free_space(out, sum(parameter.nbytes for parameter in empty_base(base, dtype).parameters()))
    model = load_sharded(base, held[0] if len(held) == 1 else dtype)
    delta = together(deltas, model, options)
    with exported_folder(out) as folder:
        copy_rest(resolve(base), folder)
        with applied(model, delta):
            state = model.full_state_dict()
        if len(held) == 1:
            _round(state, held[0], dtypes_of(empty_base(base, dtype)))
        write_files(model.module, state, folder)
        write_card(folder, "hf", deltas, base, dtype, options)


def _round(state: dict[str, Tensor], held: str, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the weights of one dtype that of their names; tied names still share one tensor."""
    names_of: dict[int, list[str]] = {}
    for name, value in state.items():
        if value.dtype == torch_dtype(held):
            names_of.setdefault(id(value), []).append(name)
    for names in names_of.values():
        state.update(dict.fromkeys(names, state[names[0]].to(dtypes[names[0]])))
