"""Prompts of a task, kept without their answers, so that the bank can be asked when the task's data are gone.

``consolidated`` (continual/methods) lets each task's delta answer them. Running text is kept whole: it is its own answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trace_dist.utils.files import reading
from trace_dist.utils.sealed import check_version, load_sealed, save_sealed

if TYPE_CHECKING:
    from trace_dist.data.encoding import Pair

VERSION = 1
COLUMNS = ("ids", "prompt_lengths", "answer_lengths")


@dataclass(frozen=True)
class Prompts:
    """What a teacher is asked.

    Attributes:
        pairs: token ids under the bank's base model. Answers are empty, but for running text.
        max_new_tokens: where an answer is cut; None for running text.
    """

    pairs: Sequence[Pair]
    max_new_tokens: int | None

    def to_tensors(self) -> dict[str, Tensor]:
        """int32: all token ids one after another, and the lengths of each prompt and of its answer."""
        ids = list(chain.from_iterable(chain(*self.pairs)))
        lengths = [[len(part) for part in pair] for pair in self.pairs]
        values = (ids, [prompt for prompt, _ in lengths], [answer for _, answer in lengths])
        return {
            name: torch.tensor(value, dtype=torch.int32) for name, value in zip(COLUMNS, values, strict=True)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], max_new_tokens: int | None) -> Prompts:
        """What ``to_tensors`` gave.

        Raises:
            KeyError, ValueError: the tensors do not belong together.
        """
        ids, prompts, answers = (tensors[name].tolist() for name in COLUMNS)
        lengths = list(chain.from_iterable(zip(prompts, answers, strict=True)))
        if min(lengths, default=0) < 0 or sum(lengths) != len(ids):
            raise ValueError(f"{len(ids)} token ids for lengths that add up to {sum(lengths)}")
        if max_new_tokens is not None and not (type(max_new_tokens) is int and max_new_tokens > 0):
            raise ValueError(f"max_new_tokens={max_new_tokens!r}")
        parts = [ids[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))]
        from trace_dist.data.encoding import Pair  # brings the readers of data, which are slow to import

        return cls([Pair(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)], max_new_tokens)


PromptSets = Mapping[str, Prompts]
"""Name of a set -> its prompts. A task has one set, named like it; the base has one for each general set."""


def save_prompts(path: Path, sets: PromptSets) -> None:
    """Write a task's prompts."""
    tensors = {
        f"{number}/{name}": tensor
        for number, prompts in enumerate(sets.values())
        for name, tensor in prompts.to_tensors().items()
    }
    caps = [prompts.max_new_tokens for prompts in sets.values()]
    header = {
        "format": "trace_dist.prompts",
        "version": VERSION,
        "sets": list(sets),
        "max_new_tokens": caps,
    }
    save_sealed(path, tensors, header)


def load_prompts(path: Path, digest: str | None = None) -> PromptSets:
    """Read a file of prompts.

    Args:
        path: the file.
        digest: SHA-256 of the file, where it is known.

    Raises:
        ValueError: missing, corrupt, of another kind, or of a newer version.
    """
    tensors, header = load_sealed(path, "prompts", digest)
    check_version(header.get("version"), path, VERSION)
    with reading(path, "prompts"):
        sets = zip(header["sets"], header["max_new_tokens"], strict=True)
        return {
            str(name): Prompts.from_tensors({key: tensors[f"{number}/{key}"] for key in COLUMNS}, cap)
            for number, (name, cap) in enumerate(sets)
        }
