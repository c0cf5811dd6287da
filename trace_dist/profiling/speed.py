"""How long a training takes, before it starts: floating-point operations over what this device reaches, and what it takes beside.

Operations per token, with P parameters outside the embeddings (Kaplan et al. 2020, section 2.1), of the experts those that it
is sent to: 2P forward, 2P for the gradients of activations, and 2P for those of the weights. A row mask pays the last for its
rows alone; a scattered mask pays it whole, layer by layer. Recomputed activations cost one more forward pass. Beside them stand
the operators that a pass launches (``profiling.passes``); in small models these are most of the time. Both rates are measured
when they are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.profiling.passes import num_operators

LARGEST = 1024
"""Rows and columns that are multiplied at most: larger products are no faster, and take long."""
SECONDS = 0.3
"""How long the device is measured."""
BRIEFLY = 0.1
"""How long it is measured for what is small."""
BACKWARD_PASSES = 2
"""A training pass goes forward once and back twice as long: for activations and for weights."""
STEP_PASSES = 1
"""What a step takes beside its passes, as forward passes: the optimizer, clipping, and on ranks the exchange."""
UTILISATION = 0.6
"""Share of that rate that a training step is taken to reach: the rest goes to attention, norms, the optimizer and gathering."""


def forward_flops(num_parameters: int, num_tokens: float) -> float:
    """Operations of a forward pass."""
    return 2.0 * num_parameters * num_tokens


def dense_flops(num_parameters: int, num_tokens: float, recomputes: bool = False) -> float:
    """Operations of training every weight; ``recomputes``: activations, in the backward pass."""
    return (8.0 if recomputes else 6.0) * num_parameters * num_tokens


def masked_flops(
    num_parameters: int, num_tokens: float, density: float, rows: bool, recomputes: bool = False
) -> float:
    """Operations of training a mask; ``rows``: whole rows, columns or tensors, whose gradient alone is computed."""
    each = (6.0 if recomputes else 4.0) + 2.0 * (density if rows else 1.0)
    return each * num_parameters * num_tokens


@dataclass(frozen=True)
class Machine:
    """What a device reaches.

    Attributes:
        matmul: operations per second of matrix products.
        launch: seconds that an operator takes which has next to nothing to do.
    """

    matmul: float
    launch: float

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device, width: int, num_tokens: int) -> Machine:
        """This device, in about half a second.

        Args:
            dtype: of the weights.
            device: which.
            width: of the model's hidden states.
            num_tokens: of a micro-batch.
        """
        return cls(matmul_rate(dtype, device, width, num_tokens), _launch_seconds(device))

    def seconds(self, flops: float, passes: float, operators: int, sharers: int = 1) -> float:
        """How long some work takes.

        Args:
            flops: its operations.
            passes: forward passes that a rank makes one after another, or what takes as long.
            operators: that a forward pass launches.
            sharers: ranks with a device each, which share the operations.
        """
        return flops / (UTILISATION * self.matmul * sharers) + passes * operators * self.launch


def step_passes(
    steps: int, batch_size: int, micro_batch_size: int, num_groups: int = 1, recomputes: bool = False
) -> float:
    """Forward passes as long as some optimizer steps of a rank.

    Args:
        steps: how many.
        batch_size: examples of a step.
        micro_batch_size: examples of a pass.
        num_groups: ranks among which the examples are divided; those that share rows count as one.
        recomputes: whether the backward pass recomputes activations.
    """
    each = -(-batch_size // num_groups)
    passes = 1 + BACKWARD_PASSES + recomputes
    return steps * (-(-each // max(1, min(micro_batch_size, each))) * passes + STEP_PASSES)


def matmul_rate(dtype: torch.dtype, device: torch.device, width: int, num_tokens: int) -> float:
    """Operations per second of the three products with which a linear layer is trained on this device, measured for a moment.

    On some devices they differ many times with the layout of their operands, and with their size.
    """
    width, num_tokens = min(width, LARGEST), min(num_tokens, LARGEST)
    x, grad = (torch.randn(num_tokens, width, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(width, width, device=device).to(dtype)
    seconds = _seconds_of(lambda: (F.linear(x, weight), grad @ weight, grad.T @ x), device, SECONDS)
    return 3 * 2.0 * num_tokens * width**2 / seconds


def _launch_seconds(device: torch.device) -> float:
    """Of an operator in a transformer so small that nothing else counts; Python's part is in it."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model: Any = LlamaForCausalLM(config).eval()
        model.to(device)
        ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
        ones = torch.ones_like(ids)
        seconds = _seconds_of(lambda: model(input_ids=ids, attention_mask=ones), device, BRIEFLY)
    return seconds / num_operators(model.to("meta"))


def _seconds_of(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """How long some work takes, on average; the first times warm up the library and are not counted."""
    for _ in range(2):
        work()
    _wait(device)
    count, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds or not count:
        work()
        _wait(device)
        count += 1
    return took / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
