"""A 4-bit base: linear layers whose frozen weights are NF4 codes (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3).

Each block of 64 consecutive elements of the row-major flattened weight keeps 16-level codes and one fp32 scale:

    w = code[c] * absmax,    absmax = max |w| over the block,    0.5 + 4/64 = 0.5625 bytes per element

in the layout of bitsandbytes, whose kernels convert in both directions.

[Note: words] ``packed`` and ``absmax`` hold these bytes as *words* of the model's dtype, bits untouched. To ZeRO-3 and FSDP2 they
are frozen parameters like any other: partitioned, gathered, and cast to the dtype that they have already. What masks, deltas
and roles speak of is the *logical* weight, ``<layer>.weight`` [out, in] (``named_weights``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trace_dist.models.wrapping import plain_name

BLOCK_SIZE = 64
"""Elements that share a scale."""
BYTES_PER_BLOCK = {"packed": BLOCK_SIZE // 2, "absmax": 4}
"""Of a block's codes and of its scale."""
BYTES_PER_ELEMENT = sum(BYTES_PER_BLOCK.values()) / BLOCK_SIZE


def _bitsandbytes() -> Any:
    """bitsandbytes' functions; raises ValueError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ValueError(
            f"quantize='nf4': needs bitsandbytes ({error}); install it (pip install 'trace-dist[nf4]') or use "
            "quantize='none'"
        ) from error
    return bitsandbytes.functional


def words_per_block(leaf: str, dtype: torch.dtype) -> int:
    """How many words of ``dtype`` hold what ``leaf`` (packed or absmax) keeps of one block."""
    return BYTES_PER_BLOCK[leaf] // dtype.itemsize


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and scales of a weight, as words of its dtype; the last block is padded with zeros.

    Args:
        weight: fp32, bf16 or fp16, any shape, on the device that computes; on the meta device only shapes follow.

    Returns:
        (packed, absmax), 1-D, of 32 and 4 bytes per block.

    Raises:
        ValueError: fp64, or bitsandbytes is missing.
    """
    if weight.is_meta:
        num_blocks = -(-weight.numel() // BLOCK_SIZE)
        packed, absmax = (
            weight.new_empty(num_blocks * words_per_block(leaf, weight.dtype)) for leaf in BYTES_PER_BLOCK
        )
        return packed, absmax
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"quantize='nf4': the weights are {weight.dtype}; load the model in bfloat16 or float32"
        )
    blocks = F.pad(weight.detach().reshape(-1), (0, -weight.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
    packed, state = _bitsandbytes().quantize_4bit(blocks, blocksize=BLOCK_SIZE, quant_type="nf4")
    return packed.view(-1).view(weight.dtype), state.absmax.view(weight.dtype)


def dequantize_weight(packed: Tensor, absmax: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight from the words of its codes and scales: [*shape], in the dtype of the words."""
    if packed.is_meta:
        return packed.new_empty(shape)
    functional = _bitsandbytes()
    scales = absmax.clone().view(torch.float32)  # a gathered tensor may begin in the middle of an fp32 word
    state = functional.QuantState(
        scales,
        torch.Size((len(scales), BLOCK_SIZE)),
        dtype=packed.dtype,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
    )
    blocks = functional.dequantize_4bit(packed.view(torch.uint8).view(-1, 1), state)
    return blocks.view(-1)[: torch.Size(shape).numel()].view(shape)


class NF4Linear(nn.Module):
    """A linear layer on a frozen NF4 weight.

    Args:
        linear: the layer it replaces; its bias is kept as it is.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed, absmax = quantize_weight(linear.weight)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.bias = linear.bias
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dtype = packed.dtype
        self.overlay: Any = None
        """None or a ``sharding.overlay.Overlay``: writes the entries that are not the codes' into a dense weight. Collective."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the logical weight."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The present weight, [out, in], made anew at each use: never kept. Collective where there is an overlay."""
        weight = self.present(self.packed, self.absmax)
        catch = self.__dict__.get("catch")  # not None iff a mask covers the layer (sharding.masked_linear)
        return weight if catch is None else catch(weight)

    def present(self, packed: Tensor, absmax: Tensor) -> Tensor:
        """The present weight from gathered words."""
        if packed.dtype != self.dtype:
            raise ValueError(
                f"model: its 4-bit words were cast from {self.dtype} to {packed.dtype}; load it in that dtype, then quantise"
            )
        weight = dequantize_weight(packed.detach(), absmax.detach(), self.shape)
        if self.overlay is not None:
            self.overlay(weight)
        return weight

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self.bias, self)

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, in memory or in a file, which has no mask (``sharding.masked_linear``)."""
        return {name: value for name, value in vars(self).items() if name not in ("forward", "catch")}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class _FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` without a gradient of W; W is made again for backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.x_dtype = layer, x.dtype
        return F.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        grad_x = (
            (grad_out @ ctx.layer.weight.to(grad_out.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        grad_bias = grad_out.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def named_weights(
    module: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter | NF4Linear]]:
    """``named_parameters``, without wrappers' names, in which an NF4 layer, as ``<layer>.weight``, stands for its words."""
    layers = {
        name: child
        for name, child in module.named_modules(remove_duplicate=remove_duplicate)
        if isinstance(child, NF4Linear)
    }
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        path, _, leaf = name.rpartition(".")
        if path not in layers or leaf == "bias":
            yield plain_name(name), parameter
        elif leaf == "packed":
            yield plain_name(f"{path}.weight" if path else "weight"), layers[path]


def quantize_nf4(module: nn.Module) -> nn.Module:
    """Replace, in place, every ``nn.Linear`` but the output head by its NF4 form, layer by layer. Layers that share a weight
    become one; a layer whose weight is an embedding's, say, stays as it is.

    What ``maskable(module, "linear")`` lists beyond those (Conv1D, fused experts) stays as it is.

    Args:
        module: an ordinary causal LM, whole, not sharded yet.

    Returns:
        ``module``.

    Raises:
        ValueError: bitsandbytes is missing, the model is fp64, none of its layers is an ``nn.Linear``, or two share a weight
            and no bias.
    """
    head = getattr(module, "get_output_embeddings", lambda: None)()
    others = {
        parameter
        for child in module.modules()
        if type(child) is not nn.Linear or child is head
        for parameter in child.parameters(recurse=False)
    }
    linears = {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if type(child) is nn.Linear and child.weight not in others
    }
    if not linears:
        raise ValueError("quantize='nf4': the model has no nn.Linear layer to quantise; use quantize='none'")
    first: dict[Tensor, str] = {}
    for name, linear in linears.items():
        other = first.setdefault(linear.weight, name)
        if linear.bias is not linears[other].bias:
            raise ValueError(
                f"quantize='nf4': {other} and {name} share a weight, but no bias; use quantize='none'"
            )
    made: dict[Tensor, NF4Linear] = {}
    for name, linear in linears.items():
        if linear.weight not in made:
            made[linear.weight] = NF4Linear(linear)
        module.set_submodule(name, made[linear.weight])
    return module
