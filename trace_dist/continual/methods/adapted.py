"""What methods that train a PEFT model of the base have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from trace_dist.config import MaskConfig, RunConfig
from trace_dist.continual.methods.dense import Dense
from trace_dist.masks.ops import layouts_for
from trace_dist.models.adapters import lora_rank
from trace_dist.models.shared import shared_names
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.speed import masked_flops

ADAPTER = "default"
"""PEFT's name of the adapter that is trained."""


class Adapted(Dense):
    """Dense training of what PEFT adds to the base."""

    @classmethod
    def flops(cls, cfg: RunConfig, num_parameters: int, num_tokens: float) -> float:
        # The base has no weight gradients; those of adapters that train as many parameters as a mask are its rows'.
        share, recomputes = cfg.largest.mask.share, cfg.train.activation_checkpointing
        return masked_flops(num_parameters, num_tokens, share, rows=True, recomputes=recomputes)

    @classmethod
    def memory_setup(cls, cfg: RunConfig, setup: MemorySetup) -> MemorySetup:
        # The base in fp32, and states of as many parameters.
        return replace(
            setup, granularity="row", dtype="float32", quantize="none", state_dtype="float32", offload="none"
        )  # fmt: skip

    @abstractmethod
    def config(self, module: Any) -> Any:
        """PEFT's configuration for the base."""

    def prepare(self, module: Any) -> nn.Module:
        from peft import get_peft_model  # slow to import, and needed here alone

        config = self.config(module)
        try:
            adapted: nn.Module = get_peft_model(module, config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"continual.methods={self.name!r}: PEFT cannot adapt this model ({error}); remove the method"
            ) from error
        return adapted

    def layers(self) -> dict[str, Any]:
        """The layers that PEFT adapted, by their names in the base."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and needed here alone

        modules = self.module.get_base_model().named_modules()
        return {name: each for name, each in modules if isinstance(each, BaseTunerLayer)}


def linear_layers(module: Any) -> dict[str, tuple[int, int]]:
    """Shapes of the weights of the layers that PEFT calls all linear ones: those but the output head."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    return {
        name: tuple(each.weight.shape)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | Conv1D) and each is not head
    }


def refuse_shared(name: str, module: nn.Module) -> None:
    """Raise ValueError where a linear layer shares its weight: what is added to it for one layer would change the other, too.

    Args:
        name: of the method.
        module: the base.
    """
    linear = {f"{layer}.weight" for layer in linear_layers(module)}
    shared = next((held for held in shared_names(module) if linear.intersection(held)), None)
    if shared is not None:
        raise ValueError(
            f"continual.methods={name!r}: {shared[0]} and {shared[1]} are one weight, into which it would merge what each "
            "has learned; remove the method"
        )


def rank_for(module: nn.Module, mask: MaskConfig) -> int:
    """The rank at which LoRA trains about as many parameters as a mask has entries."""
    layouts = layouts_for(module, "element", 1, mask.maskable)
    return lora_rank(module, mask.share * sum(layout.numel for layout in layouts.values()))
