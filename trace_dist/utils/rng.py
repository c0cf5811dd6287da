"""Random numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from trace_dist.utils import dist


def random_numbers_kept() -> AbstractContextManager[None]:
    """Puts torch's generators of this process back at the end of the block."""
    device = dist.local_device()
    kept: AbstractContextManager[None] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return kept
