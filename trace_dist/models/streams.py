"""Models whose layers hand on several residual streams of each token, and the one that stands for them.

Gemma 3n has [streams, B, T, hidden]: its ``altup_active_idx`` is the token's own, and the others are guesses at it. Models with
hyper-connections (arXiv 2409.19606), such as DeepSeek V4, have [B, T, streams, hidden], all of one rank: their mean stands for
them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def one_stream(states: Tensor, config: Any) -> Tensor:
    """[B, T, hidden] of what a decoder layer hands on; others than those of several streams as they are.

    Args:
        states: [B, T, hidden], [streams, B, T, hidden] or [B, T, streams, hidden].
        config: of the model.
    """
    if states.dim() != 4:
        return states
    active = getattr(config.get_text_config(), "altup_active_idx", None)
    return states.mean(dim=2) if active is None else states[active]
