"""Which examples a task is validated on, where its source does not say.

[Note: held out] Prompts are put in the order of a hash of their text, and taken one after the other, each with all of its
examples, until as many are held out as were asked for, or a fifth of the training examples. A prompt with more examples than
there is room for is passed over. So it depends neither on the order of the source nor on the number of ranks; a prompt is
either trained or validated; and a prompt that is tested is never validated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from trace_dist.data.examples import Example, prompt_key

MOST_HELDOUT = 0.2
"""Share of the training examples that may be held out."""


def hold_out(
    examples: Sequence[Example], num: int, tested: Collection[str]
) -> tuple[list[Example], list[Example]]:
    """Split training examples into those that stay and those that are held out ([Note: held out]).

    Args:
        examples: the training examples.
        num: how many are held out at most.
        tested: keys of the prompts that are tested.

    Returns:
        What stays, in its order, and what is held out, in the order of the hash; that is empty where no prompt can be spared.
    """
    free = [example for example in examples if prompt_key(example["prompt"]) not in tested]
    room = max(1, min(num, int(MOST_HELDOUT * len(examples))))
    held = by_hash(free, room)
    taken = {prompt_key(example["prompt"]) for example in held}
    stays = [example for example in examples if prompt_key(example["prompt"]) not in taken]
    return (stays, held) if stays else (list(examples), [])


def by_hash(examples: Sequence[Example], num: int) -> list[Example]:
    """At most ``num`` examples, whole prompts in the order of their hash; the smallest prompt where none is small enough."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_key(example["prompt"]), []).append(example)
    order = sorted(groups, key=_rank)
    chosen, room = [], num
    for prompt in order:
        if len(groups[prompt]) <= room:
            chosen.append(prompt)
            room -= len(groups[prompt])
    if order and not chosen:
        chosen = [min(order, key=lambda prompt: (len(groups[prompt]), _rank(prompt)))]
    return [
        example for prompt in chosen for example in sorted(groups[prompt], key=lambda each: each["answer"])
    ]


def _rank(prompt: str) -> bytes:
    """Its place in the order. Another hash than the one by which a source is split off a test set."""
    return hashlib.sha256(b"validation " + prompt.encode()).digest()
