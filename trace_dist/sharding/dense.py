"""Dense training under DeepSpeed ZeRO-3: what masked training is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.models.loading import load_model_zero3
from trace_dist.sharding.zero3 import load_deepspeed, start_deepspeed, zero3_config


def dense_engine(module: nn.Module, dtype: torch.dtype, zero: dict[str, Any], lr: float = 1e-4) -> Any:
    """A ZeRO-3 engine that trains every unfrozen parameter with torch's fused AdamW, clipping to norm 1.

    Args:
        module: the model.
        dtype: of the weights; DeepSpeed keeps an fp32 master.
        zero: DeepSpeed's section ``zero_optimization``, beside the stage.
        lr: learning rate.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    config = zero3_config(dtype) | {"gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3, **zero}
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    return start_deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]


def dense_states(engine: Any) -> dict[str, list[Tensor]]:
    """This rank's model states of a ``dense_engine``, by category."""
    optimizer = engine.optimizer
    moments = list(optimizer.optimizer.state.values())
    return {
        "weights": [parameter.ds_tensor for parameter in engine.module.parameters()],
        "master": list(optimizer.fp32_partitioned_groups_flat),
        "exp_avg": [state["exp_avg"] for state in moments],
        "exp_avg_sq": [state["exp_avg_sq"] for state in moments],
        "gradients": [optimizer.grad_partitions_flat_buffer],
    }


class FullAdamW:
    """Ordinary training of every parameter of a checkpoint with AdamW.

    Args:
        path: Hugging Face id or folder.
        dtype: of the weights; DeepSpeed keeps an fp32 master.
        lr: learning rate.
    """

    def __init__(self, path: str, dtype: torch.dtype, lr: float) -> None:
        load_deepspeed()
        config = zero3_config(dtype)
        module = load_model_zero3(path, dtype, config)
        self.module = dense_engine(module, dtype, config["zero_optimization"], lr)

    def backward(self, loss: Tensor) -> None:
        """Backward pass through DeepSpeed, which reduces and partitions the gradients."""
        self.module.backward(loss)

    def step(self) -> None:
        """Optimizer step."""
        self.module.step()

    def states(self) -> dict[str, list[Tensor]]:
        """This rank's model states, by category."""
        return dense_states(self.module)

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self.module.destroy()
