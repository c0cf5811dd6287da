"""Token ids that a model has no embedding for, found before it reads them."""

from __future__ import annotations

import datasets
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import encode_pairs
from trace_dist.data.examples import references_of
from trace_dist.data.tasks import Task


def check_ids(
    task: Task, tokenizer: PreTrainedTokenizerBase, role: str, vocab_size: int, scored: bool
) -> None:
    """Refuse a tokenizer that writes ids beyond a model's embedding.

    Args:
        task: the examples.
        tokenizer: the model's.
        role: target or proxy.
        vocab_size: of the model's config.
        scored: whether it reads test and validation examples as well.

    Raises:
        ValueError: an example has an id of ``vocab_size`` or more.
    """
    if max(tokenizer.get_vocab().values(), default=0) < vocab_size:
        return
    parts = {"training": task.train, "test": task.test, "validation": task.validation}
    for part, rows in parts.items():
        if rows is None or not (scored or part == "training"):
            continue
        highest = _highest_id(rows, tokenizer)
        if highest >= vocab_size:
            raise ValueError(
                f"{role}.path: a {part} example holds {tokenizer.convert_ids_to_tokens(highest)!r}, token {highest} of its "
                f"tokenizer, but the model embeds {vocab_size} (vocab_size); save the model with resize_token_embeddings("
                f"{highest + 1}) or more, or with the tokenizer that it was trained with"
            )


def _highest_id(examples: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    asked = [(row["prompt"], answer) for row in examples.to_list() for answer in references_of(row)]
    pairs = encode_pairs([prompt for prompt, _ in asked], [answer for _, answer in asked], tokenizer)
    return max(max(*pair.prompt, *pair.answer) for pair in pairs)
