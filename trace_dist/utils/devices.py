"""Tensors on their way between devices."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device. What comes from the CPU is not waited for.

    An ordinary ``to`` lets the host wait until the accelerator has done all that it was given before. An asynchronous copy from
    pageable memory has read it when it returns, so the tensor may go or change at once; one to the CPU has not written it.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")
