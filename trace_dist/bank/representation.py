"""What stands for a prompt in task retrieval: one hidden layer of the base, pooled over the prompt's tokens.

mean      sum over tokens t of h_t / T
last      h_T
max       max over t of h_t, each dimension by itself
mean_std  mean, and the square root of the mean of (h_t - mean)^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trace_dist.config.bank import Pooling
from trace_dist.data.encoding import check_context
from trace_dist.evaluation.inputs import pad
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.models.forward import names_argument
from trace_dist.models.streams import one_stream


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Hidden states of prompts over the tokens that are not padding (formulas above).

    Args:
        states: [B, T, hidden] floating; where a token is padding they may be anything.
        mask: [B, T] int64, 1 where there is a token, at least one; padding on the right.

    Returns:
        [B, hidden] fp32; [B, 2 hidden] of mean_std.
    """
    real, counts = mask[:, :, None] == 1, mask.sum(dim=1, keepdim=True)
    x = states.float()
    if pooling == "last":
        return x[torch.arange(len(x), device=x.device), counts[:, 0] - 1]
    if pooling == "max":
        return x.where(real, -torch.inf).amax(dim=1)
    # where, not a product: a padded position may hold anything, and 0 * inf is NaN
    mean = x.where(real, 0.0).sum(dim=1) / counts
    if pooling == "mean":
        return mean
    squares = (x - mean[:, None]).where(real, 0.0).square()
    return torch.cat([mean, (squares.sum(dim=1) / counts).sqrt()], dim=1)


def alike(x: Sequence[Tensor]) -> bool:
    """Whether all representations of a set, [N, D], are one, as those of a chat template's last token before any layer.

    No signature can be made of such a set.
    """
    return any(bool((each == each[0]).all()) for each in x)


def _hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, chosen: Sequence[int]) -> list[Tensor]:
    """[B, T, hidden] of each of the chosen hidden layers."""
    # logits of every token would dominate the memory, and nobody reads them
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)
    options = {"logits_to_keep": first} if names_argument(model, "logits_to_keep") else {}
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **options)
    layers = outputs.hidden_states
    for layer in chosen:
        if not -len(layers) <= layer < len(layers):
            raise ValueError(
                f"bank.layer={layer}: must lie in [{-len(layers)}, {len(layers)}) for this model "
                "(0 is the embedding); use -1 for the last"
            )
    return [one_stream(layers[layer], model.config) for layer in chosen]


def represent(
    model: PreTrainedModel,
    tokenizer_prompts: Sequence[Sequence[int]],
    *,
    layer: int,
    batch_size: int,
    pad_id: int,
    pooling: Pooling = "mean",
) -> Tensor:
    """Representations of prompts by one hidden layer and pooling; see ``represent_views``.

    Args:
        model, tokenizer_prompts, batch_size, pad_id: as ``represent_views``.
        layer: index into the model's hidden states: 0 is the embedding, -1 the last.
        pooling: how the tokens of a prompt become one vector (``pooled``).

    Returns:
        [num_prompts, D] fp32 on the CPU, in the order of the prompts, equal on every rank.

    Raises:
        ValueError: as ``represent_views``.
    """
    views = represent_views(
        model, tokenizer_prompts, layers=[layer], poolings=[pooling], batch_size=batch_size, pad_id=pad_id
    )
    return views[pooling][:, 0]


def represent_views(
    model: PreTrainedModel,
    tokenizer_prompts: Sequence[Sequence[int]],
    *,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    batch_size: int,
    pad_id: int,
) -> dict[Pooling, Tensor]:
    """Representations of prompts under the model as it is, by several hidden layers and poolings of one forward pass, computed by
    all ranks together.

    Prompts are padded on the right, which no causal model sees; a batch holds the same prompts whatever the number of
    ranks (evaluation/passes.py).

    Args:
        model: a transformers causal LM, or a sharded model's ``module``; called as a whole (the hooks of
            ZeRO-3 sit on it), in evaluation mode, without gradients.
        tokenizer_prompts: token ids of each prompt, the same on every rank.
        layers: indices into the model's hidden states: 0 is the embedding, -1 the last.
        poolings: how the tokens of a prompt become one vector (``pooled``).
        batch_size: prompts per forward pass on one rank.
        pad_id: token id for padding on the right (masked out).

    Returns:
        By pooling, [num_prompts, L, D] fp32 on the CPU, in the order of the prompts, equal on every rank.

    Raises:
        ValueError: no prompt, an empty prompt, one beyond the context, a batch size of 0, or no such layer.
    """
    lengths = [len(prompt) for prompt in tokenizer_prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"prompts: {lengths.count(0)} of {len(lengths)} are empty, each must hold a token; drop them"
        )
    check_context(max(lengths), model.config)
    device = next(model.parameters()).device

    def run(batch: list[int]) -> list[list[Tensor]]:
        ids, mask = pad([tokenizer_prompts[i] for i in batch], pad_id, device, left=False)
        states = _hidden(model, ids, mask, layers)
        views = [
            torch.stack([pooled(each, mask, pooling) for each in states], dim=1).cpu() for pooling in poolings
        ]
        # clones: a row that is pickled for the other ranks would take the whole batch with it
        return [[view[row].clone() for view in views] for row in range(len(batch))]

    with evaluating(model) as alone:
        rows = map_over_ranks(lengths, batch_size, run, alone)
    return {
        pooling: torch.stack(view) for pooling, view in zip(poolings, zip(*rows, strict=True), strict=True)
    }
