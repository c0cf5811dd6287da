"""Activation checkpoints that transformers enables, of the kind that works with frozen weights.

A reentrant checkpoint runs a backward pass of its own in every layer, behind the back of ZeRO-3 and of the exchange, and sees
a gradient only if its input requires one. Where a model reads tokens, transformers makes the embeddings' output require it;
with the other kind that would make backward run, and recompute, down to the embeddings, however high the lowest masked layer
lies. Where it reads pixels nothing requires one, and no layer would be trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


class ActivationCheckpoints:
    """A forward pre-hook of a model: it makes checkpoints non-reentrant and lets backward stop above the embeddings.

    Args:
        module: the model; what transformers made of it may lie anywhere in it. Checkpoints may be enabled at any later time.
    """

    def __init__(self, module: nn.Module) -> None:
        parts: list[Any] = list(module.modules())
        self._with_inputs = [part for part in parts if hasattr(part, "disable_input_require_grads")]
        self._layers = [part for part in parts if hasattr(part, "gradient_checkpointing")]

    def __call__(self, *_: Any) -> None:
        for part in self._with_inputs:
            if getattr(part, "_require_grads_hooks", None):
                part.disable_input_require_grads()
        reentrant = [layer for layer in self._layers if _is_reentrant(layer)]
        for layer in reentrant:
            checkpoint = layer._gradient_checkpointing_func
            keywords = {**getattr(checkpoint, "keywords", {}), "use_reentrant": False}
            layer._gradient_checkpointing_func = partial(getattr(checkpoint, "func", checkpoint), **keywords)
        if reentrant:
            logger.warning(
                "activation checkpointing: use_reentrant=True hides each layer's backward pass; switched to use_reentrant=False"
            )


def _is_reentrant(layer: Any) -> bool:
    """Whether a layer is checkpointed the reentrant way, torch's default when nothing is said."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if not layer.gradient_checkpointing or checkpoint is None:
        return False
    return bool(getattr(checkpoint, "keywords", {}).get("use_reentrant", True))
