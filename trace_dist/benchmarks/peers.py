"""What the peers train with: PEFT's adapters, Liger's kernels, and DeepSpeed's AdamW for CPUs, set up as their users do."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trace_dist.masks.ops import layouts_for
from trace_dist.models.adapters import lora_rank
from trace_dist.utils import dist


def with_adapters(name: str, module: PreTrainedModel, density: float) -> nn.Module:
    """PEFT's adapters on every linear layer, of the rank that trains ``density`` of their weights.

    Args:
        name: ``LoRA`` or ``SHiRA``.
        module: the model; PEFT changes it.
        density: trained parameters over the linear layers' weights.
    """
    from peft import LoraConfig, ShiraConfig, get_peft_model

    layouts = layouts_for(module, "element", 1, "linear")
    rank = lora_rank(module, density * sum(layout.numel for layout in layouts.values()))
    if name == "LoRA":
        return get_peft_model(module, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    linear = sorted({name.split(".")[-2] for name in layouts})
    return get_peft_model(module, ShiraConfig(r=rank, target_modules=linear))


def with_liger(module: PreTrainedModel) -> None:
    """Liger's kernels in a Llama: norms, rotations, gated units, and the loss together with the last projection.

    Raises:
        ValueError: they are not installed, or there is no GPU.
    """
    if dist.local_device().type != "cuda":
        raise ValueError("contestants: Liger's kernels want a GPU, and there is none; leave them out")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise ValueError(
            f"contestants: Liger's kernels lack a package ({error}); pip install 'trace-dist[gpu]'"
        ) from None
    apply_liger_kernel_to_llama(model=module)


def cpu_adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPU tensors; it is compiled on first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=lr, adamw_mode=True)
