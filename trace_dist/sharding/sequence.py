"""Sequence parallelism: ranks of a group share rows, and each holds a slice of the activations (data/slices.py).

[Note: heads for slices] All of a decoder but attention treats tokens one by one. Around attention two all-to-alls in the group
turn a slice of all heads into all tokens of some heads, and back: DeepSpeed Ulysses (Jacobs et al., arXiv 2309.14509).

    q, k, v  [batch, heads, l, dim]      ->  [batch, heads / n, n l, dim]
    output   [batch, n l, heads / n, dim] ->  [batch, l, heads, dim]

Where there are fewer key heads than ranks, each is sent to the ranks whose query heads read it. DeepSpeed's own module for
transformers (``UlyssesSPAttentionHF``) does the same, but takes the place of ``sdpa`` for all models of the process, drops masks
(sliding windows, packed rows), and wants micro-batches of one size. Here attention is one more of transformers' implementations
(``AttentionInterface``), and masks are made for the whole rows by transformers' own functions.

A forward pass is one on slices where its inputs say so (``ROW_POSITIONS``). Any other pass runs as without sequence parallelism:
evaluation, generation, whatever reads whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trace_dist.config.checks import check_ranks
from trace_dist.data.slices import ROW_POSITIONS, sliced
from trace_dist.models.architecture import stated
from trace_dist.models.forward import names_argument
from trace_dist.sharding.comm import Comm

NAME = "trace_dist_sequence_parallel"
"""What transformers call this attention."""
INNER = "sdpa"
"""The attention that runs on all tokens of some heads."""

_pass: _Pass | None = None
"""The slices of the last forward pass, whose layers a backward pass may run again; None where it was on whole rows."""


def check_divisible(config: Any, size: int, field: str = "sequence_parallel") -> None:
    """Whether ``size`` ranks can share the attention heads of a model.

    Args:
        config: its transformers config.
        size: ranks that share rows.
        field: begins the message.

    Raises:
        ValueError: they cannot.
    """
    text = config.get_text_config()
    heads = stated(text, "num_attention_heads")
    if heads is None:
        raise ValueError(
            f"{field}={size}: a model of the family {config.model_type!r} has no attention heads to share; use 1"
        )
    # Layers may differ in the number of their key heads.
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    for keys in sorted({getattr(layer, "num_key_value_heads", None) or heads for layer in layers}):
        check_heads(heads, keys, size, field)


def check_heads(heads: int, keys: int, size: int, field: str = "sequence_parallel") -> None:
    """Raise ValueError unless ``size`` ranks can share so many query heads and key heads; ``field`` begins the message."""
    if heads % size or (keys % size and size % keys):
        fits = [n for n in range(1, heads + 1) if heads % n == 0 and (keys % n == 0 or n % keys == 0)]
        raise ValueError(
            f"{field}={size}: must divide the model's {heads} attention heads, and divide its {keys} key heads or be a multiple "
            f"of them; use one of {', '.join(map(str, fits))}"
        )


class SequenceParallel:
    """Lets the ranks of a group share rows. Collective.

    Args:
        module: a transformers model.
        size: ranks of a group, one after another; the data-parallel groups are the world's ranks over it.
        comm: the ranks.

    Raises:
        ValueError: the ranks or the heads cannot be divided so, or the model's attention cannot be replaced.
    """

    def __init__(self, module: nn.Module, size: int, comm: Comm) -> None:
        check_divisible(module.config, size)
        check_ranks(comm.world, size)
        self.size, self.index, self._comm = size, comm.rank % size, comm
        _use_attention(module, size)
        comm.open_rows(size)
        module.register_forward_pre_hook(self._enter, with_kwargs=True)

    def slice(self, batch: dict[str, Tensor], pad_id: int = 0) -> dict[str, Tensor]:
        """This rank's slice of a micro-batch that all ranks of its group have (``data.slices.sliced``)."""
        return sliced(batch, self.size, self.index, pad_id)

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        global _pass
        rows = inputs.get(ROW_POSITIONS)
        _pass = None if rows is None else _Pass(self.size, self._comm, rows)
        if rows is None:
            return None
        inputs = {name: value for name, value in inputs.items() if name != ROW_POSITIONS}
        # Without a mask transformers would look for several examples within the slice.
        return args, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


def _use_attention(module: Any, size: int) -> None:
    """Let a model attend through ``_attend``. Raises ValueError where it cannot."""
    name, before = type(module).__name__, module.config.get_text_config()._attn_implementation
    if before not in (INNER, NAME):
        raise ValueError(
            f"sequence_parallel={size}: runs on {INNER} attention, and {name} was loaded with {before!r}; load it with "
            f"attn_implementation={INNER!r}, or use 1"
        )
    if not names_argument(module, "position_ids"):
        raise ValueError(
            f"sequence_parallel={size}: {name} takes no position_ids, and so cannot read a slice; use 1"
        )
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    module.set_attn_implementation(NAME)
    if module.config.get_text_config()._attn_implementation != NAME:
        raise ValueError(
            f"sequence_parallel={size}: {name} has an attention of its own, which cannot be shared; use 1"
        )


class _Pass:
    """A forward pass on slices: rows of ``size`` slices, with the positions of their tokens within packed examples."""

    def __init__(self, size: int, comm: Comm, row_positions: Tensor) -> None:
        self.size, self._comm = size, comm
        self._positions = row_positions if row_positions.shape[1] > 1 else None

    def mask_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A pattern of attention within each example of packed rows; indices are those of whole rows."""
        if self._positions is None:
            return function
        positions, examples = self._positions, (self._positions == 0).cumsum(1)

        def within(batch: Any, head: Any, query: Any, key: Any) -> Any:
            there = function(batch, head, positions[batch, query], positions[batch, key])
            return there & (examples[batch, query] == examples[batch, key])

        return within

    @property
    def packed(self) -> bool:
        """Whether rows hold several examples."""
        return self._positions is not None

    def gather_heads(self, *parts: Tensor) -> list[Tensor]:
        """[batch, heads, l, dim] each, in one exchange -> [batch, heads / size, size l, dim]."""
        split = [part.unflatten(1, (self.size, -1)).movedim(1, 0) for part in parts]
        received = self._swap(torch.cat([part.reshape(self.size, -1) for part in split], 1))
        widths = [part[0].numel() for part in split]
        return [
            mine.view(part.shape).permute(1, 2, 0, 3, 4).flatten(2, 3)
            for mine, part in zip(received.split(widths, 1), split, strict=True)
        ]

    def gather_tokens(self, part: Tensor) -> Tensor:
        """[batch, size l, heads / size, dim] -> [batch, l, heads, dim]."""
        split = part.unflatten(1, (self.size, -1)).movedim(1, 0)
        received = self._swap(split.reshape(self.size, -1)).view(split.shape)
        return received.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _swap(self, sent: Tensor) -> Tensor:
        return _Swap.apply(sent, self._comm, self.size)


class _Swap(torch.autograd.Function):
    """Sends row i, [size, n], to rank i of the group and receives one of each; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, comm: Comm, size: int) -> Tensor:
        ctx.comm, ctx.size = comm, size
        return comm.swap_rows(sent, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.comm.swap_rows(grads[0].contiguous(), ctx.size), None, None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers call it; q, k, v [batch, heads, length, dim], the output [batch, length, heads, dim]."""
    attend, now = ALL_ATTENTION_FUNCTIONS[INNER], _pass
    if now is None:
        return attend(module, query, key, value, attention_mask, **options)
    if key.shape[1] % now.size:
        copies = now.size // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    query, key, value = now.gather_heads(query, key, value)
    with _groups(module, query.shape[1] // key.shape[1]):
        output, _ = attend(module, query, key, value, attention_mask, **options)
    return now.gather_tokens(output), None


@contextmanager
def _groups(module: Any, number: int) -> Iterator[None]:
    """Let a layer believe that so many query heads share a key head, as they do among those that this rank attends with."""
    before = getattr(module, "num_key_value_groups", None)
    if before is None or before == number:
        yield
        return
    module.num_key_value_groups = number
    try:
        yield
    finally:
        module.num_key_value_groups = before


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """transformers' mask for the attention that runs inside: of whole rows, without padding, which lies behind every token."""
    now = _pass
    if now is not None:
        q_length = kv_length = now.size * q_length
        attention_mask, mask_function = None, now.mask_function(mask_function)
        if now.packed:
            options["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function, attention_mask=attention_mask, **options
    )
