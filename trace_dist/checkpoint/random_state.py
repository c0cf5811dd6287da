"""The generators that dropout draws from, one rank's: kept with its tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trace_dist.checkpoint.format import rank_file
from trace_dist.utils import dist


def random_state() -> dict[str, Tensor]:
    """State of this rank's generators, on the CPU."""
    state = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random/cuda"] = torch.cuda.get_rng_state()
    return state


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
        torch.cuda.set_rng_state(mine.get_tensor("random/cuda"))
