"""How long a training takes, before it starts: floating-point operations over what this device reaches.

Operations per token, with P parameters outside the embeddings (Kaplan et al. 2020, section 2.1): 2P forward, 2P for
the gradients of activations, and 2P for those of the weights. A row mask pays the last for its rows alone; a
scattered mask pays it whole, layer by layer.
"""

from __future__ import annotations

import time

import torch

SIZE = 1024
"""Rows and columns of the matrices that are multiplied."""
SECONDS = 0.3
"""How long the device is measured."""
UTILISATION = 0.4
"""Share of that rate that a training step is taken to reach: the rest goes to attention, norms, the optimizer and gathering."""


def forward_flops(num_parameters: int, num_tokens: float) -> float:
    """Operations of a forward pass."""
    return 2.0 * num_parameters * num_tokens


def dense_flops(num_parameters: int, num_tokens: float) -> float:
    """Operations of training every weight."""
    return 6.0 * num_parameters * num_tokens


def masked_flops(num_parameters: int, num_tokens: float, density: float, rows: bool) -> float:
    """Operations of training a mask; ``rows``: whole rows or columns, whose gradient alone is computed."""
    return (4.0 + 2.0 * (density if rows else 1.0)) * num_parameters * num_tokens


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a matrix product on this device, measured for a moment."""
    left = torch.randn(SIZE, SIZE, dtype=torch.float32, device=device).to(dtype)
    count, begin = 0, 0.0
    # The first products warm up the library and are not counted.
    for number in range(10_000):
        if number == 2:
            _wait(device)
            begin = time.perf_counter()
        left @ left
        if number >= 2:
            _wait(device)
            count += 1
            if time.perf_counter() - begin > SECONDS:
                break
    return 2.0 * SIZE**3 * count / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
