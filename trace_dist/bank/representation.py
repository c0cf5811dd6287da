"""What stands for a prompt in task retrieval: the mean over its tokens of one hidden layer of the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trace_dist.data.encoding import check_context
from trace_dist.models.forward import names_argument
from trace_dist.utils import dist


def _right_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right and attention mask, both [B, longest] int64."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[pad_id] * (longest - len(prompt))] for prompt in prompts], device=device)
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    return ids, (torch.arange(longest, device=device) < lengths).long()


def _mean_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """[B, hidden] fp32 mean of hidden layer ``layer`` over the tokens that are not padding."""
    # logits of every token would dominate the memory, and nobody reads them
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)
    options = {"logits_to_keep": first} if names_argument(model, "logits_to_keep") else {}
    outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **options)
    layers = outputs.hidden_states
    if not -len(layers) <= layer < len(layers):
        raise ValueError(
            f"bank.layer={layer}: must lie in [{-len(layers)}, {len(layers)}) for this model "
            "(0 is the embedding); use -1 for the last"
        )
    # where, not a product: a padded position may hold anything, and 0 * inf is NaN
    hidden = layers[layer].float().where(mask[:, :, None] == 1, 0.0)
    return hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True)


@torch.no_grad()  # inference_mode would leave inference tensors in parameters that ZeRO-3 gathers
def represent(
    model: PreTrainedModel,
    tokenizer_prompts: Sequence[Sequence[int]],
    *,
    layer: int,
    batch_size: int,
    pad_id: int,
) -> Tensor:
    """Representations of prompts under the frozen base, computed by all ranks together.

    Batches of prompts of similar length go to the ranks in turn. Each rank runs the same number of forward
    passes (some repeat a batch and drop the result): a rank that stopped early would leave the others
    waiting in ZeRO-3's all-gathers. A batch holds the same prompts whatever the number of ranks.

    Args:
        model: a transformers causal LM, or a sharded model's ``module``; called as a whole (the hooks of
            ZeRO-3 sit on it), in evaluation mode, without gradients.
        tokenizer_prompts: token ids of each prompt, the same on every rank.
        layer: index into the model's hidden states: 0 is the embedding, -1 the last.
        batch_size: prompts per forward pass on one rank.
        pad_id: token id for padding on the right (masked out).

    Returns:
        [num_prompts, hidden] fp32 on the CPU, in the order of the prompts, equal on every rank.

    Raises:
        ValueError: no prompt, an empty prompt, one beyond the context, a batch size of 0, or no such layer.
    """
    lengths = [len(prompt) for prompt in tokenizer_prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"prompts: {lengths.count(0)} of {len(lengths)} are empty, each must hold a token; drop them"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1; use for example 32")
    check_context(max(lengths), model.config)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    num_passes = -(-len(batches) // dist.world_size())
    device = next(model.parameters()).device
    rows: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    try:
        for step in range(num_passes):
            mine = step * dist.world_size() + dist.rank()
            batch = batches[min(mine, len(batches) - 1)]
            ids, mask = _right_pad([tokenizer_prompts[i] for i in batch], pad_id, device)
            means = _mean_hidden(model, ids, mask, layer)
            if mine < len(batches):
                rows.update(zip(batch, means, strict=True))
    finally:
        model.train(was_training)
    result = torch.zeros(len(lengths), means.shape[1], device=device)
    for index, row in rows.items():
        result[index] = row
    return dist.sum_over_ranks(result).cpu()  # each row is nonzero on one rank only, so the sum is exact
