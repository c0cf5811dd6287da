"""What a run keeps for its report: a few answers of each task, and how clearly its prompts were told apart."""

from __future__ import annotations

import json
import math

import pytest
import torch
from continual.small import TASKS, result
from hypothesis import given
from hypothesis import strategies as st

from trace_dist.bank.bank import BASE
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import fit_signature
from trace_dist.config import RunConfig
from trace_dist.continual.clarity import MOST, margins, ranked, typicality
from trace_dist.continual.examples import KEPT, LONGEST, Answered, cut, few
from trace_dist.continual.scored import Scored
from trace_dist.continual.setting import Setting
from trace_dist.evaluation import Score
from trace_dist.report import write_report
from trace_dist.stages.report import collect_results

NUM, RATE = 60, 0.1


def prompts(task: int, seed: int) -> torch.Tensor:
    """[NUM, 6] representations of one of two tasks that overlap."""
    generator = torch.Generator().manual_seed(seed)
    return 1.2 * task + torch.randn(NUM, 6, generator=generator) * torch.linspace(0.5, 3, 6)


def retriever() -> Retriever:
    return Retriever(fit_signature(prompts(i, 10 + i), 1, 0, f"t{i}") for i in range(2))


def test_a_run_keeps_answers_that_its_scores_belong_to(whole: RunConfig) -> None:
    found = result(whole, "retrieved")["retrieval"]["examples"]
    assert list(dict.fromkeys(example["task"] for example in found)) == list(TASKS)
    tests = {stream.task.name: stream.task.test.to_list() for stream in Setting.load(whole).bench.tasks}
    for example in found:
        row = next(row for row in tests[example["task"]] if row["prompt"] == example["prompt"])
        assert example["references"] == [row["answer"]]
        assert example["score"] == float(example["answer"] == row["answer"])
        assert example["retrieved"] in (BASE, *TASKS)
    for task in TASKS:
        scores = [example["score"] for example in found if example["task"] == task]
        assert scores == sorted(scores, reverse=True)
        assert scores.count(1.0) == KEPT
        assert 0 < scores.count(0.0) <= KEPT


def test_margins_of_a_run_agree_with_its_confusion(whole: RunConfig) -> None:
    retrieval = result(whole, "retrieved")["retrieval"]
    for i, row in enumerate(retrieval["confusion"]):
        assert retrieval["margins"]["num_right"][i] == row[i + 1]
        assert retrieval["margins"]["num_wrong"][i] == sum(row) - row[i + 1]
        assert all(value > 0 for value in retrieval["margins"]["right"][i])
        assert all(value <= 0 for value in retrieval["margins"]["wrong"][i])
    assert "rejection" not in retrieval


def test_the_report_shows_the_run(whole: RunConfig) -> None:
    text = write_report(collect_results(whole), whole.folder.report).read_text()
    assert "Margins of retrieval" in text
    example = result(whole, "retrieved")["retrieval"]["examples"][0]
    assert example["prompt"] in text


def test_leads_and_typicality_decide_what_is_retrieved_and_rejected() -> None:
    bank, x = retriever(), prompts(0, 1)
    lead = bank.lead(x, "t0")
    assert torch.equal(lead > 0, bank.predict(x) == 0)
    torch.testing.assert_close(lead.abs(), bank.margin(x))
    found = margins(bank, {"t0": x, "of another run": x})
    assert found["num_right"][0] + found["num_wrong"][0] == NUM
    assert 0 < found["num_wrong"][0] < NUM
    assert found["right"][1] == found["wrong"][1] == []
    assert found["num_right"][1] == 0
    rejected = bank.rejects(x + 1, bank.predict(x + 1), RATE)
    typical = typicality(bank, {"t0": x + 1}, RATE)
    assert typical["rate"] == RATE
    assert typical["num_rejected"] == [int(rejected.sum())]
    assert 0 < len(typical["rejected"][0]) < NUM
    assert max(typical["rejected"][0]) < 0 <= min(typical["kept"][0])


def test_where_nothing_can_be_told_nothing_is_drawn() -> None:
    alone = Retriever([fit_signature(prompts(0, 0), 1, 0, "t0")])
    assert margins(alone, {"t0": prompts(0, 1)}) == {}
    # so low a rate cannot be shown by its held-out prompts: all are kept, at no distance from a threshold
    found = typicality(alone, {"t0": prompts(0, 1)}, 1e-4)
    assert (found["num_kept"], found["num_rejected"], found["kept"]) == ([NUM], [0], [[]])


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.inf), max_size=3 * MOST))
def test_ranked_values_span_what_they_stand_for(values: list[float]) -> None:
    found = ranked(torch.tensor(values, dtype=torch.float64))
    finite = sorted(value for value in values if value < math.inf)
    assert len(found) == min(MOST, len(finite))
    assert found == sorted(found)
    if finite:
        assert found[0] == pytest.approx(finite[0], rel=1e-3)
        assert found[-1] == pytest.approx(finite[-1], rel=1e-3)


@given(st.dictionaries(st.integers(0, 50), st.sampled_from([0.0, 0.3, 0.5, 1.0])))
def test_few_are_the_best_right_and_the_worst_wrong_ones(scores: dict[int, float]) -> None:
    found = few(scores)
    right = [i for i in found if scores[i] >= 0.5]
    wrong = [i for i in found if scores[i] < 0.5]
    assert found == right + wrong
    assert len(right) == min(KEPT, sum(score >= 0.5 for score in scores.values()))
    assert len(wrong) == min(KEPT, sum(score < 0.5 for score in scores.values()))
    assert all(scores[i] <= min((scores[j] for j in right), default=1) for i in scores if i not in right)


def test_answers_are_kept_with_their_scores_and_survive_a_file() -> None:
    scored = Scored()
    scored.add("t0", "t0", [4, 7, 1, 9], Score(50.0, 4, [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]))
    scored.add("t0", "t0", [0, 2], Score(50.0, 2, [1.0, 0.0], ["e", "f"]))
    assert scored.of("t0", "t0") == {4: 1.0, 7: 0.0, 1: 1.0, 9: 1.0, 0: 1.0, 2: 0.0}
    assert scored.answers == {"t0": {"t0": {0: "e", 1: "c", 4: "a", 2: "f", 7: "b"}}}
    assert Scored.from_json(json.loads(json.dumps(scored.to_json()))) == scored
    older = {"examples": {"t0": {"t0": {"3": 1.0}}}, "texts": {}}
    assert Scored.from_json(older).answers == {}
    scored.add("t0", "no answers", [0], Score(0.0, 1, [0.0]))
    assert scored.answers["t0"]["no answers"] == {}


def test_long_texts_and_conversations_are_readable() -> None:
    assert cut("short") == "short"
    text = cut("begin" + "x" * 2000 + "end")
    assert len(text) <= LONGEST
    assert text.startswith("begin")
    assert text.endswith("end")
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}]
    row = {"prompt": turns, "answer": "a", "references": ["a", "b", "c", "d"]}
    answered = Answered.of("t", row, BASE, "a" * 2000, 1.0).to_json()
    assert answered["prompt"] == "user: Hello.\nassistant: Yes?"
    assert answered["references"] == ["a", "b", "c"]
    assert len(answered["answer"]) <= LONGEST
