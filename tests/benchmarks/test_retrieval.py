"""The study of retrieval on a tiny model: what is cut off is not missed, and what is on disk is not made again."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.bank.representation import represent_views
from trace_dist.benchmarks.document import render
from trace_dist.benchmarks.representations import Reader, RetrievalSettings, shortened
from trace_dist.benchmarks.retrieval import LIMITS, run_study
from trace_dist.benchmarks.retrieval_page import RESULT, SECTIONS, draw
from trace_dist.models import char_tokenizer
from trace_dist.parts import SIGNATURES

DOCS = Path(__file__).parents[2] / "docs"


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=vocab_size,
            max_position_embeddings=128,
        )
    )


@pytest.fixture
def plan(tmp_path: Path) -> RetrievalSettings:
    generator, tasks, prompts = random.Random(0), [], {}
    for name, letters in (("one", "abc"), ("two", "xyz"), ("twin", "xyz")):
        rows = [{"prompt": "".join(generator.choices(letters, k=8)), "answer": "a"} for _ in range(90)]
        prompts[name] = [row["prompt"] for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": name, "path": str(tmp_path / f"{name}.jsonl"), "num_train": 40, "num_test": 8})
    tokenizer = char_tokenizer(prompts, "a")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "target": {"path": str(tmp_path / "model")},
        "data": {"max_length": 64, "truncate_prompt": True},
        "bank": {"layer": 0, "clusters": 2},
        "tasks": tasks,
    }
    return replace(RetrievalSettings.of(config), layers=(0, 2))


def test_what_lies_above_is_not_missed() -> None:
    prompts = [[1, 2, 3], [4, 5]]
    whole = represent_views(
        tiny_llama(20), prompts, layers=[0, 2], poolings=["mean"], batch_size=2, pad_id=0
    )["mean"]
    short = shortened(tiny_llama(20), 2)
    assert len(short.model.layers) == 2
    found = represent_views(short, prompts, layers=[0, 2], poolings=["mean"], batch_size=2, pad_id=0)["mean"]
    assert torch.equal(found, whole)
    with pytest.raises(ValueError, match=r"layers: 3, must lie in \[0, 3\)"):
        shortened(tiny_llama(20), 3)


def test_a_study_and_its_page(
    plan: RetrievalSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "retrieval.json"
    result = run_study(plan, out, sizes=(1, 2))
    assert [kind["kind"] for kind in result["kinds"]] == list(SIGNATURES)
    for kind in result["kinds"]:
        one, _, three = kind["sizes"]
        assert [size["tasks"] for size in kind["sizes"]] == [1, 2, 3]
        assert one["accuracy"] == 100
        # the twin has the same prompts: it cannot be told apart, and the pair is named
        assert three["accuracy"] < 95
        assert three["low"] < three["accuracy"] < three["high"]
        assert three["prompts"] == 24
        assert {frozenset((pair["task"], pair["retrieved"])) for pair in kind["confused"]} == {
            frozenset(("two", "twin"))
        }
        assert all(5 < pair["percent"] <= 100 for pair in kind["confused"])
        assert three["limits"].keys() == three["held"].keys() == LIMITS.keys()
        assert three["held"]["clopper_pearson"]
    again = json.loads(out.read_text())
    assert again["kinds"][0]["sizes"][-1]["accuracy"] == result["kinds"][0]["sizes"][-1]["accuracy"]
    for section, (names, table) in SECTIONS.items():
        if names != (RESULT,):
            continue
        assert again["run_info"]["date"][:10] in table(again), section
    draw(again, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    # What is on disk is not made again: no model is loaded.
    monkeypatch.setattr(Reader, "loaded", property(lambda _: pytest.fail("the model was loaded")))
    assert [Reader(plan).read(task).train[2, "max"].shape for task in plan.tasks] == [(40, 16)] * 3


def test_the_page_shows_the_committed_results() -> None:
    page = (DOCS / "retrieval.md").read_text(encoding="utf-8")
    assert render(page, DOCS / "results", SECTIONS) == page
    result = json.loads((DOCS / "results" / RESULT).read_text())
    assert len(result["tasks"]) >= 50
    for kind in result["kinds"]:
        # The limits that assume nothing of the fitted parameters hold on fresh prompts.
        for size in kind["sizes"]:
            assert size["held"]["clopper_pearson"]
            assert size["held"]["cantelli"]
            assert size["held"]["gaussian"]
