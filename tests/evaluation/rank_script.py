"""One rank of ``test_ranks``: evaluates a saved model, writes its scores and its number of forward passes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trace_dist.evaluation import bits_per_byte, choice_accuracy, decode, exact_match, greedy_decode
from trace_dist.utils import dist


def evaluate_all(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, str]]
) -> dict[str, Any]:
    forwards = [0]

    def count(*_: object) -> None:
        forwards[0] += 1

    hook = model.register_forward_pre_hook(count)
    texts = [row["prompt"] for row in examples]
    choices = sorted({row["answer"] for row in examples})
    prompts = tokenizer(texts)["input_ids"]
    decoded = greedy_decode(model, tokenizer, prompts, batch_size=2, max_new_tokens=9)
    with patch.object(decode, "asked_every", lambda _: 4):
        assert greedy_decode(model, tokenizer, prompts, batch_size=2, max_new_tokens=9) == decoded
    scores = {
        "exact_match": exact_match(model, tokenizer, examples, batch_size=2, max_new_tokens=9),
        "choice": choice_accuracy(model, tokenizer, examples, choices, batch_size=4),
        "text": bits_per_byte(model, tokenizer, texts, batch_size=2),
    }
    hook.remove()
    results = {name: dataclasses.asdict(score) for name, score in scores.items()}
    return {**results, "decoded": decoded, "forwards": forwards[0]}


def main(folder: Path, out: Path) -> None:
    dist.init_distributed()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = evaluate_all(model, tokenizer, json.loads((folder / "examples.json").read_text()))
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(scores))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
