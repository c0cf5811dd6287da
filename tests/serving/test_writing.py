"""Answers of one batch that differ in length, on a model whose positions end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trace_dist.serving.options import Sampling
from trace_dist.serving.row import Row
from trace_dist.serving.writing import write, write_out

CONTEXT, END = 32, 40
PROMPTS = [[3] * 30, [1, 2], [4] * 12, [5, 6, 7], [2] * 31, [8] * 17]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=END + 1, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2)
    ).eval()


def rows(prompts: Sequence[list[int]]) -> list[Row]:
    """Each may be as long as its prompt leaves room."""
    return [
        Row(ids, CONTEXT - len(ids) + 1, [], [END], lambda ids: " ".join(map(str, ids))) for ids in prompts
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_long_prompt_beside_a_long_answer_stays_within_the_positions(model: Any, batch_size: int) -> None:
    alone, together, shared = rows(PROMPTS), rows(PROMPTS), rows(PROMPTS)
    for row in alone:
        write(model, [row], Sampling(), [END], 0)
    write(model, together, Sampling(), [END], 0)
    write_out(model, shared, batch_size, [END], 0)
    wanted = [row.text for row in alone]
    assert all(wanted)
    assert [row.text for row in together] == [row.text for row in shared] == wanted
    assert [row.finish for row in shared] == [row.finish for row in alone]


def test_rows_that_fit_are_written_in_one_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, generate = [], model.generate

    def noted(**options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        return generate(**options)

    monkeypatch.setattr(model, "generate", noted)
    short = [Row(ids, 2, [], [END], str) for ids in PROMPTS[:4]]
    write_out(model, short, 4, [END], 0)
    assert sizes == [4]
