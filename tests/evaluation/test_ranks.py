"""Two gloo processes give both ranks the scores of one, with equally many forward passes each."""

from __future__ import annotations

import json
import random
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launching import free_port, python, rank_environment
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trace_dist.data import encode_prompt
from trace_dist.evaluation import greedy_decode

SCRIPT = Path(__file__).with_name("rank_script.py")
ROOT = Path(__file__).parents[2]


def run_ranks(world_size: int, folder: Path, out: Path) -> list[dict[str, Any]]:
    env = rank_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(world_size)}
    command = [python(), str(SCRIPT), str(folder), str(out)]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}) for rank in range(world_size)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world_size)]


def prompts_that_keep_one_rank_busy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Five prompts of falling length: those of rank 0 decode to the cap, those of rank 1 stop well before."""
    draw = random.Random(0)
    prompts = []
    for length in (9, 8, 7, 6, 5):
        pool = ["".join(draw.choices("abcdefgh", k=length)) for _ in range(64)]
        outputs = greedy_decode(
            model, tokenizer, encode_prompt(pool, tokenizer), batch_size=64, max_new_tokens=9
        )
        wanted = (len(ids) == 9 if length % 2 else len(ids) < 4 for ids in outputs)
        prompts.append(next(prompt for prompt, ok in zip(pool, wanted, strict=True) if ok))
    return prompts


def test_ranks_agree_with_one_process(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # 3 + 2 prompts in batches of 2: rank 1 ends with a filler.
    prompts = prompts_that_keep_one_rank_busy(model, tokenizer)
    ids = encode_prompt(prompts, tokenizer)
    outputs = greedy_decode(model, tokenizer, ids, batch_size=1, max_new_tokens=9)
    texts = tokenizer.batch_decode(outputs, skip_special_tokens=True)
    examples = [{"prompt": p, "answer": texts[i] if i % 2 else "a"} for i, p in enumerate(prompts)]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "examples.json").write_text(json.dumps(examples))

    single = runpy.run_path(str(SCRIPT))["evaluate_all"](model, tokenizer, examples)
    ranks = run_ranks(2, tmp_path, tmp_path)

    assert single["decoded"] == outputs
    assert 0 < single["exact_match"]["value"] < 100
    for rank in ranks:
        for name in ("exact_match", "decoded", "choice"):
            assert rank[name] == single[name]
        assert rank["text"]["value"] == pytest.approx(single["text"]["value"], rel=1e-5)
    assert len({rank["forwards"] for rank in ranks}) == 1
    assert ranks[0]["forwards"] < single["forwards"]
