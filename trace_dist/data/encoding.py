"""Text to tokens: prompt tokens, answer tokens, and a loss on the answer alone.

[Note: prompt part and answer part]
A prompt is all that the tokenizer's chat template writes before the answer (data/template.py), or, without a
template, the plain text after the tokenizer's own first token. The answer part is what follows when prompt and
answer are tokenised as one text, up to and with the end-of-turn token (or eos). Training, generation and
signatures must see the same prompt tokens, so where tokenising both as one text changes them (a merge across the
seam) the answer is tokenised by itself and appended.

A conversation's prompt holds the answers of its earlier turns. They carry a loss too, each with its end token.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Sequence
from functools import cache as once
from typing import Any, NamedTuple, cast

import datasets
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from trace_dist.config import DataConfig
from trace_dist.data import examples, template
from trace_dist.data.bars import bars_on_main
from trace_dist.data.cache import cached, caching
from trace_dist.data.examples import Prompt
from trace_dist.data.template import Frame, end_token, frames
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

IGNORE = -100
"""Label of a token that carries no loss."""


class Pair(NamedTuple):
    """Token ids of a prompt and of its answer; the answer ends with one of ``stop_ids``."""

    prompt: list[int]
    answer: list[int]


def pad_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """Id that fills padded positions; they are masked out, so any id below ``vocab_size`` serves where there is no pad token."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    known = [int(token) for token in candidates if token is not None]
    return next(token for token in known if vocab_size is None or token < vocab_size)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the chat template's end-of-turn token first, where it has one, then eos.

    Raises:
        ValueError: there is neither, or the template cannot be rendered.
    """
    end = end_token(tokenizer) if tokenizer.chat_template else None
    found = [] if end is None else [cast(int, tokenizer.convert_tokens_to_ids(end))]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(int(tokenizer.eos_token_id))
    if not found:
        raise ValueError(
            "tokenizer.eos_token=None: answers need a token that ends them; set tokenizer.eos_token"
        )
    return found


def encode_prompt(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Prompt part of each prompt ([Note: prompt part and answer part]), for training and generation alike.

    Args:
        prompts: plain texts, or the turns of conversations.
        tokenizer: with or without a chat template.
        max_tokens: cut longer prompts on the left to this many tokens, one number for all or one each (a first bos token stays).

    Raises:
        ValueError: a prompt has no token, so there is nothing to condition an answer on; or the template cannot be
            rendered.
    """
    encoded = _prompt_ids([frame.prompt for frame in frames(prompts, tokenizer)], tokenizer)
    if max_tokens is None:
        return encoded
    limits = [max_tokens] * len(encoded) if isinstance(max_tokens, int) else max_tokens
    return [_cut_left(ids, limit, tokenizer.bos_token_id) for ids, limit in zip(encoded, limits, strict=True)]


def encode_pairs(
    prompts: Sequence[Prompt], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Pair]:
    """Prompt part and answer part of each example, untruncated; the answer part ends with its end token."""
    return _framed_pairs(frames(prompts, tokenizer), answers, tokenizer)


def _framed_pairs(
    around: list[Frame], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Pair]:
    prompt_ids = _prompt_ids([frame.prompt for frame in around], tokenizer)
    stops = stop_ids(tokenizer)
    texts = [f.prompt + f.lead + answer + f.tail for f, answer in zip(around, answers, strict=True)]
    joint_ids = tokenize(texts, tokenizer, special_tokens=not tokenizer.chat_template)
    alone_ids = tokenize(list(answers), tokenizer, special_tokens=False)
    pairs = []
    for prompt, joint, alone in zip(prompt_ids, joint_ids, alone_ids, strict=True):
        answer = joint[len(prompt) :] if joint[: len(prompt)] == prompt else alone
        pairs.append(Pair(prompt, _ended(answer, stops)))
    return pairs


def last_pair(input_ids: list[int], labels: list[int]) -> Pair:
    """The last answer of an encoded example, and all that stands before it."""
    start = len(labels) - labels[::-1].index(IGNORE)
    return Pair(input_ids[:start], input_ids[start:])


def encode(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig
) -> datasets.Dataset:
    """Tokenise examples for training; cached on disk by content, in ``cfg.num_proc`` processes.

    Args:
        dataset: columns ``prompt`` (a text, or turns) and ``answer``.
        tokenizer: with or without a chat template.
        cfg: longest example and what happens to longer ones.

    Returns:
        Columns ``input_ids`` and ``labels`` (int32 lists; labels are -100 on all that nobody answered) and
        ``num_answer_tokens`` (int32, with a loss), in the order of ``dataset``.

    Raises:
        ValueError: an example is longer than ``cfg.max_length`` and its prompt may not be cut, or its answer
            alone fills it.
    """
    ids = datasets.Sequence(datasets.Value("int32"))
    number = datasets.Value("int32")
    cache = cached(_digest(dataset, tokenizer, cfg), ".arrow")
    with caching(), bars_on_main():
        encoded = dataset.map(
            _encode_batch,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            fn_kwargs={"tokenizer": tokenizer, "cfg": cfg},
            features=datasets.Features(input_ids=ids, labels=ids, num_answer_tokens=number, num_cut=number),
            num_proc=cfg.num_proc if cfg.num_proc > 1 else None,
            cache_file_name=str(cache),
            new_fingerprint=cache.stem,
            desc="tokenising",
        )
    num_cut = sum(n > 0 for n in encoded["num_cut"][:])
    if num_cut:
        say_cut(num_cut, len(encoded), cfg.max_length)
    return encoded.remove_columns("num_cut")


@once
def say_cut(num_cut: int, num: int, max_length: int, which: str = "prompts") -> None:
    """Said once: a stage encodes the same data for several models."""
    logger.warning("cut %d of %d %s to data.max_length=%d tokens", num_cut, num, which, max_length)


def check_context(tokens_needed: int, model_config: PreTrainedConfig) -> None:
    """Raise ValueError when a sequence of ``tokens_needed`` tokens does not fit the model's positions."""
    limit = context_length(model_config)
    if limit is not None and tokens_needed > limit:
        raise ValueError(
            f"{tokens_needed} tokens do not fit the model's {limit} positions (max_position_embeddings); "
            f"set data.max_length to at most {limit} with data.truncate_prompt=true, or choose another model"
        )


def context_length(model_config: PreTrainedConfig) -> int | None:
    """Positions of a model; None where its config states no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def _prompt_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded = tokenize(texts, tokenizer, special_tokens=not tokenizer.chat_template)
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(
                f"example {i}: prompt {texts[i]!r} has no tokens; drop it or use a tokenizer with bos"
            )
    return encoded


def tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of each text.

    Args:
        special_tokens: with the tokens that the tokenizer puts before a text.

    Raises:
        ValueError: the tokenizer has no token for a part of a text, and none for unknown parts.
    """
    if not texts:
        return []
    try:
        encoded: list[list[int]] = tokenizer(
            texts, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]
    # Tokenizers in Rust raise nothing more special.
    except Exception as error:
        text = next((text for text in texts if not _is_tokenized(text, tokenizer)), texts[0])
        raise ValueError(
            f"{text!r:.200}: the tokenizer cannot read it ({error}); give the tokenizer an unk_token that its "
            "vocabulary holds, or drop the example"
        ) from error
    if special_tokens:
        encoded = [_unclosed(ids, text, tokenizer) for ids, text in zip(encoded, texts, strict=True)]
    return encoded


def _unclosed(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text's ids without the eos with which some tokenizers close every text, which would end the prompt; its own stays."""
    eos = tokenizer.eos_token_id
    if not ids or ids[-1] != eos:
        return ids
    own: list[int] = []
    if text.endswith(str(tokenizer.eos_token)):
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[:-1] if not own or ids[-len(own) - 1 : -1] == own else ids


def _is_tokenized(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        tokenizer(text, verbose=False)
    except Exception:
        return False
    return True


def _ended(answer: list[int], stops: list[int]) -> list[int]:
    """The answer up to and with its first end token, where generation stops too; one is added where it has none."""
    first = next((i for i, token in enumerate(answer) if token in stops), None)
    return [*answer, stops[0]] if first is None else answer[: first + 1]


def _cut_left(ids: list[int], max_tokens: int, bos: int | None) -> list[int]:
    if len(ids) <= max_tokens:
        return ids
    if ids[0] == bos and max_tokens > 1:
        return [ids[0], *ids[len(ids) - max_tokens + 1 :]]
    return ids[len(ids) - max_tokens :]


def _encode_batch(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, cfg: DataConfig
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "num_answer_tokens": [], "num_cut": []}
    around = frames(batch["prompt"], tokenizer)
    pairs = _framed_pairs(around, batch["answer"], tokenizer)
    for i, frame, (prompt, answer) in zip(indices, around, pairs, strict=True):
        room = cfg.max_length - len(answer)
        _check_room(i, len(prompt), len(answer), cfg)
        kept = _cut_left(prompt, room, tokenizer.bos_token_id)
        labels = _prompt_labels(prompt, frame, tokenizer)[len(prompt) - len(kept) :] + answer
        # Nothing stands before the first token, so that it is never predicted.
        labels[0] = IGNORE
        columns["input_ids"].append(kept + answer)
        columns["labels"].append(labels)
        columns["num_answer_tokens"].append(len(labels) - labels.count(IGNORE))
        columns["num_cut"].append(len(prompt) - len(kept))
    return columns


def _check_room(i: int, num_prompt: int, num_answer: int, cfg: DataConfig) -> None:
    if num_answer >= cfg.max_length:
        raise ValueError(
            f"example {i}: its answer has {num_answer} tokens and is never cut, but data.max_length="
            f"{cfg.max_length} leaves no room for a prompt; raise data.max_length above {num_answer}"
        )
    if num_prompt + num_answer > cfg.max_length and not cfg.truncate_prompt:
        raise ValueError(
            f"example {i}: prompt {num_prompt} + answer {num_answer} tokens exceed data.max_length="
            f"{cfg.max_length}; raise data.max_length or set data.truncate_prompt=true"
        )


def _prompt_labels(ids: list[int], frame: Frame, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Labels of a prompt's tokens: the answers of earlier turns, each with its end token."""
    labels, stops = [IGNORE] * len(ids), stop_ids(tokenizer) if frame.earlier else []
    for place in frame.earlier:
        texts = [frame.prompt[:end] for end in place]
        before = tokenize(texts, tokenizer, special_tokens=not tokenizer.chat_template)
        first, last = (_num_shared(ids, part) for part in before)
        last += last < len(ids) and ids[last] in stops
        labels[first:last] = ids[first:last]
    return labels


def _num_shared(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _digest(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> str:
    """Name of the cache file: the examples, the tokenizer, the options and the source of what encodes them.

    datasets' own fingerprint would hash the tokenizer object, whose state changes when it is first used.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        inspect.getsource(sys.modules[__name__]),
        inspect.getsource(template),
        inspect.getsource(examples),
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template),
        f"{cfg.max_length} {cfg.truncate_prompt} {cfg.num_proc}",
    )
    digest = hashlib.sha256(json.dumps(parts).encode())
    for column in ("prompt", "answer"):
        digest.update(json.dumps(dataset[column][:]).encode())
    return digest.hexdigest()[:32]
