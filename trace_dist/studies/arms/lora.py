"""Arm ``lora``: PEFT LoRA on every linear layer; its rank is that of ``continual.options.lora``."""

from __future__ import annotations

from trace_dist.studies.arm import Method


class LoRA(Method):
    """Method lora."""

    label = "LoRA"
    colour = "pink"
    method = "lora"


ARM = LoRA
