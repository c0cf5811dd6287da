"""The generators that dropout draws from, one rank's: kept with its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.checkpoint.format import damaged, rank_file
from trace_dist.utils import dist
from trace_dist.utils.files import MALFORMED


def random_state() -> dict[str, Tensor]:
    """State of this rank's generators, on the CPU."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state(dist.local_device())
    return state


def check_random_state(folder: Path, files: dict[str, Any]) -> None:
    """Raise ``Damaged`` where this rank's file has no state that a generator takes."""
    if len(files) != dist.world_size():
        return
    try:
        torch.Generator().set_state(files[rank_file()].get_tensor("random/cpu"))
    except MALFORMED:
        raise damaged(folder / rank_file()) from None


def restore_random_state(files: dict[str, Any]) -> None:
    """Set the generators from this rank's file; where another number of ranks wrote, they start anew.

    Args:
        files: every rank's opened file by name.
    """
    if len(files) != dist.world_size():
        return
    mine = files[rank_file()]
    names = mine.keys()
    torch.set_rng_state(mine.get_tensor("random/cpu"))
    if torch.cuda.is_available() and "random/cuda" in names:
        torch.cuda.set_rng_state(mine.get_tensor("random/cuda"), dist.local_device())
