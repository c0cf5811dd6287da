"""Encoded examples with what a teacher says of their answers."""

from __future__ import annotations

from typing import Any

import torch

from trace_dist.train.soft import SOFT_IDS, SOFT_PROBABILITIES


def taught(
    generator: torch.Generator, length: int, answer: int, vocabulary: int, most: int = 3
) -> dict[str, Any]:
    """Random tokens, of which the last ``answer`` are the answer; the teacher names ``most`` tokens at each of those."""
    ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
    return {
        "input_ids": ids,
        "labels": [-100] * (length - answer) + ids[length - answer :],
        "num_answer_tokens": answer,
        SOFT_IDS: [torch.randperm(vocabulary, generator=generator)[:most].tolist() for _ in range(answer)],
        SOFT_PROBABILITIES: [[0.5, 0.2, 0.1]] * answer,
    }
