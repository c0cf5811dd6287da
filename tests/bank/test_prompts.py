"""Prompts that a bank keeps: as they were given, or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trace_dist.bank.prompts import Prompts, load_prompts, save_prompts
from trace_dist.data.encoding import Pair
from trace_dist.utils.sealed import save_sealed

SETS = {
    "sum": Prompts([Pair([5, 6], []), Pair([7], [])], 4),
    "text": Prompts([Pair([1], [2, 70_000, 3])], None),
    "none": Prompts([], 1),
}


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    save_prompts(path, SETS)
    assert load_prompts(path) == SETS
    again = tmp_path / "again.safetensors"
    save_prompts(again, SETS)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"0/ids": torch.tensor([5], dtype=torch.int32)}, "1 token ids for lengths that add up to 3"),
        ({"0/prompt_lengths": torch.tensor([4, -1], dtype=torch.int32)}, "corrupt"),
        ({"0/answer_lengths": torch.tensor([0], dtype=torch.int32)}, "corrupt"),
        ({"max_new_tokens": [0]}, "max_new_tokens=0"),
        ({"max_new_tokens": ["many"]}, "max_new_tokens='many'"),
        ({"sets": ["sum", "more"]}, "corrupt"),
        ({"version": 2}, "version 2, but this release reads 1"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, changed: dict, message: str) -> None:
    path = tmp_path / "prompts.safetensors"
    tensors = {f"0/{name}": tensor for name, tensor in SETS["sum"].to_tensors().items()}
    header = {"format": "trace_dist.prompts", "version": 1, "sets": ["sum"], "max_new_tokens": [4]}
    tensors |= {name: value for name, value in changed.items() if name.startswith("0/")}
    header |= {name: value for name, value in changed.items() if not name.startswith("0/")}
    save_sealed(path, tensors, header)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)
