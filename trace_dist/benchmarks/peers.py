"""The peers: DeepSpeed, and PEFT under DeepSpeed, set up as their users do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trace_dist.masks.ops import layouts_for
from trace_dist.models.adapters import lora_rank
from trace_dist.sharding.zero3 import zero3_config
from trace_dist.utils import dist


def dense_engine(module: nn.Module, zero: dict[str, Any]) -> tuple[Any, int]:
    """A ZeRO-3 engine that trains every unfrozen bf16 parameter with torch's fused AdamW, clipping to norm 1.

    Args:
        module: the model.
        zero: DeepSpeed's section ``zero_optimization``, beside the stage.

    Returns:
        The engine and the number of parameters it trains.
    """
    dist.ensure_group()
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in parameters)
    config = zero3_config(torch.bfloat16) | {"gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3, **zero}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0], num_trained


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


def cpu_adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPU tensors; it is compiled on first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=lr, adamw_mode=True)
