"""Greedy decoding, the same on every rank, equal to ``generate(do_sample=False)`` prompt by prompt.

The loop is ours rather than ``model.generate`` because all ranks of a sharded model must take the same
number of decoding steps, unless its weights are held whole meanwhile.

[Note: padding and caches]
Attention can be told to leave out positions, so prompts are padded on the left and their keys and values are kept.
Recurrent layers (Mamba, RWKV, short convolutions) carry padding on the left into their state, and each family keeps
that state in its own way. Nothing to the right of a token reaches it in any causal model: where a model does not
keep keys and values alone, prompts are padded on the right, and every step reads the whole text again. A model that
padding on the right changes all the same decodes one prompt at a time.
A model whose own positions begin behind the id of padding (RoBERTa) is padded on the right too: given positions begin at 0,
and are not those of training. Its ``generate`` gives it these.

[Note: caps] Of prompts with caps of their own, a short one may go on where a long one has used up the model's positions. A model
with rotary positions reads the long one on at its last position, and what it writes there is dropped. Others have tables that
end: there such prompts are decoded apart.

[Note: asking] Whether all prompts have ended only the device knows, and where forward passes are collective only all ranks
together. To ask takes as long as an accelerator is behind its host, so it is asked every few tokens; what was decoded beyond
the end is dropped. A CPU is never behind, and asks at each token.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache as once
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import check_context, context_length, stop_ids
from trace_dist.evaluation.inputs import (
    cache_argument,
    check_decoder,
    config_of,
    device_of,
    fill_id,
    keeps_keys_alone,
    last,
    may_pad_left,
    pad,
    positions,
    safe_batch_size,
    supported,
)
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
ASKED_EVERY = 8
"""Tokens after which an accelerator is asked whether all prompts have ended."""


def greedy_decode(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int | Sequence[int],
) -> list[list[int]]:
    """Continue each prompt by the most likely token until a stop token (not returned) or the cap.

    Args:
        model: causal LM, possibly sharded; every rank must call this with the same prompts.
        tokenizer: for the ids of stops and padding.
        prompts: token ids; each has at least one.
        batch_size: prompts decoded together on one rank.
        max_new_tokens: cap on decoded tokens, one for all prompts or one each.

    Returns:
        All outputs, in the order of ``prompts``, on every rank.

    Raises:
        ValueError: no prompts, an empty one, a cap below 1, more tokens than the model's context, or a model that is
            not a decoder.
    """
    caps = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if min(caps, default=1) < 1:
        raise ValueError(f"eval.max_new_tokens={min(caps)}: must be at least 1; raise it or leave it out")
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError(
            f"prompts: {lengths.count(0)} of {len(lengths)} are empty, each must hold a token; drop them"
        )
    check_decoder(model)
    # The last token is not read again.
    check_context(max(map(sum, zip(lengths, caps, strict=True))) - 1, config_of(model))
    outputs: dict[int, list[int]] = {}
    with evaluating(model) as alone:
        fill = fill_id(model, tokenizer)
        size = safe_batch_size(model, prompts, fill, batch_size)
        context = context_length(config_of(model))
        for group, most in _groups(lengths, caps, None if _is_rotary(model) else context):
            decoder = _Decoder(model, stop_ids(tokenizer), fill, most, alone, context)
            run = partial(_decoded, decoder, [prompts[i] for i in group])
            found = map_over_ranks([lengths[i] for i in group], size, run, alone)
            outputs.update(zip(group, found, strict=True))
    return [outputs[i][:cap] for i, cap in enumerate(caps)]


def _decoded(decoder: _Decoder, prompts: list[list[int]], batch: list[int]) -> list[list[int]]:
    return decoder([prompts[i] for i in batch])


def _is_rotary(model: torch.nn.Module) -> bool:
    """Whether positions are rotations, which end nowhere."""
    return getattr(config_of(model).get_text_config(), "rope_parameters", None) is not None


def _groups(
    lengths: Sequence[int], caps: Sequence[int], context: int | None
) -> Iterator[tuple[list[int], int]]:
    """Prompts that are decoded together, and how many steps: those of the largest cap among them, all within the context
    ([Note: caps])."""
    left = list(range(len(lengths)))
    while left:
        most = max(caps[i] for i in left)
        room = None if context is None else context - most + 1
        yield [i for i in left if room is None or lengths[i] <= room], most
        left = [i for i in left if room is not None and lengths[i] > room]


class _Decoder:
    """Decodes batches of one model ([Note: padding and caches]); ``alone``: its forward passes are not collective.

    ``context``: its positions; None where it states no limit ([Note: caps]).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        stops: list[int],
        fill: int,
        max_new_tokens: int,
        alone: bool,
        context: int | None,
    ) -> None:
        self.model, self.fill, self.max_new_tokens, self.alone = model, fill, max_new_tokens, alone
        self.last_place = sys.maxsize if context is None else context - 1
        self.is_stop = torch.tensor(stops, device=device_of(model))

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        decoded = self._with_cache(prompts) if may_pad_left(self.model) else None
        if decoded is None:
            _say_slow(type(self.model).__name__)
            decoded = self._without_cache(prompts)
        return decoded

    def _with_cache(self, prompts: list[list[int]]) -> list[list[int]] | None:
        """None where the model turns out to keep anything but keys and values."""
        tokens, mask = pad(prompts, self.fill, self.is_stop.device, left=True)
        position_ids = positions(mask)
        chosen = _Chosen(len(prompts), self.is_stop, self.alone)
        cache_name, cache = str(cache_argument(self.model)), None
        for _ in range(self.max_new_tokens):
            options = {"position_ids": position_ids, "logits_to_keep": last(tokens, 1), cache_name: cache}
            output = self.model(
                input_ids=tokens, attention_mask=mask, use_cache=True, **supported(self.model, **options)
            )
            cache = getattr(output, cache_name, None)
            if not keeps_keys_alone(cache):
                return None
            tokens = output.logits[:, -1:].argmax(dim=-1)
            if chosen.add(tokens[:, 0]):
                break
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            position_ids = (position_ids[:, -1:] + 1).clamp(max=self.last_place)
        return chosen.ids()

    def _without_cache(self, prompts: list[list[int]]) -> list[list[int]]:
        tokens, mask = pad(prompts, self.fill, self.is_stop.device, left=False)
        # Of each prompt the column of its last token, and how many columns from the right the leftmost of them is.
        ends, num = mask.sum(dim=1, keepdim=True) - 1, tokens.shape[1] - min(map(len, prompts)) + 1
        rows = torch.arange(len(prompts), device=tokens.device)
        chosen = _Chosen(len(prompts), self.is_stop, self.alone)
        for _ in range(self.max_new_tokens):
            options = {"attention_mask": mask, "use_cache": False, "logits_to_keep": last(tokens, num)}
            logits = self.model(input_ids=tokens, **supported(self.model, **options)).logits
            here = ends[:, 0] - tokens.shape[1] + logits.shape[1]
            best = logits[rows, here].argmax(dim=-1)
            if chosen.add(best):
                break
            ends = (ends + 1).clamp(max=self.last_place)
            more = (0, int(tokens.shape[1] <= self.last_place))
            tokens = nn.functional.pad(tokens, more, value=self.fill).scatter(1, ends, best[:, None])
            mask = nn.functional.pad(mask, more).scatter(1, ends, 1)
        return chosen.ids()


class _Chosen:
    """The tokens chosen so far for each of some prompts; -1 from the stop token on."""

    def __init__(self, num: int, is_stop: torch.Tensor, alone: bool) -> None:
        self.is_stop, self.alone = is_stop, alone
        self.every = asked_every(is_stop.device)
        self.done = torch.zeros(num, dtype=torch.bool, device=is_stop.device)
        self.columns: list[torch.Tensor] = []

    def add(self, tokens: torch.Tensor) -> bool:
        """Keep the next token of each prompt, int64 [num]; whether all prompts are known to have ended ([Note: asking]).

        Those of all ranks, unless alone: a rank that is done goes on until the slowest is, where forward passes are collective.
        """
        self.done = self.done | torch.isin(tokens, self.is_stop)
        self.columns.append(tokens.masked_fill(self.done, -1))
        if len(self.columns) % self.every:
            return False
        going = (~self.done).any().to(torch.int32)
        return not (going if self.alone else dist.largest_over_ranks(going))

    def ids(self) -> list[list[int]]:
        rows = torch.stack(self.columns, dim=1).tolist()
        return [[token for token in row if token >= 0] for row in rows]


def asked_every(device: torch.device) -> int:
    """Tokens after which it is asked whether all prompts have ended ([Note: asking])."""
    return 1 if device.type == "cpu" else ASKED_EVERY


@once
def _say_slow(model: str) -> None:
    logger.warning(
        "%s keeps more than keys and values: it decodes without a cache, which takes longer", model
    )
