"""What finding a task costs: all of the measurement on a tiny model."""

from __future__ import annotations

import pytest

from trace_dist.bank.adapted import Adapted
from trace_dist.benchmarks import contestants
from trace_dist.benchmarks.contestants import Race
from trace_dist.benchmarks.routes import KINDS, measure

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}


def test_a_prompt_is_tried_with_its_candidates_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contestants.SHAPES, "tiny", TINY)
    tried: list[str] = []
    under = Adapted._under
    monkeypatch.setattr(
        Adapted, "_under", lambda self, task, *rest: tried.append(task) or under(self, task, *rest)
    )
    found = measure(Race("tiny", 0.1, 1, 8), sizes=(1, 6), rounds=1)
    assert [row["tasks"] for row in found["rows"]] == [1, 6]
    assert all(row[f"{kind}_ms"] > 0 for row in found["rows"] for kind in KINDS)
    assert found["rows"][0]["adapted_ratio"] == 1
    # One candidate of one task, and three of six, in each of two rounds.
    assert len(tried) == 2 * (1 + 3)
