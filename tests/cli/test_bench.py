"""``trace-dist bench``: small races on real ranks, and what is refused. Nothing here looks at a clock's reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.program import error_line, run, run_here
from trace_kernels.bench import BLOCKS, OPS, WITHOUT_BLOCKS

STEP = ("bench", "step", "--shape", "tiny", "--sequence", "24", "--micro_batch", "2")
SHORT = ("--rounds", "1", "--steps", "2")


@pytest.mark.launcher
def test_a_race_of_training_steps(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    names = ["block 64", "full", "LoRA"]
    arguments = (*STEP, *SHORT, "--attention", "sdpa", "--out", out)
    done = run(*arguments, "--contestants", json.dumps(names), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == names
    assert rows["full"]["step_ratio"] == rows["full"]["gradient_bytes_ratio"] == 1
    assert rows["block 64"]["gradient_bytes_ratio"] < 0.1
    assert rows["LoRA"]["num_trained"] == pytest.approx(rows["block 64"]["num_trained"], rel=0.2)
    assert rows["full"]["num_trained"] > 10 * rows["block 64"]["num_trained"]
    for row in rows.values():
        assert row["weight_bytes_sent"] > 0
        assert row["time_s"]["attention"] > 0  # as asked; the unfused one is other operators
        assert sum(row["phases_s"].values()) == pytest.approx(row["step_s"], rel=0.5)
    first = result["runs"]["full"]
    # It goes on where it stopped: for two rounds of one contestant a single launch is left.
    done = run(*arguments, "--rounds", "2", "--contestants", '["full"]', cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert [len(runs[name]) for name in names] == [1, 2, 1]
    assert runs["full"][0] == first[0]


def test_every_kernel_is_timed_at_every_granularity(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    done = run_here("bench", "kernels", "--out", out, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    timed = {(row["op"], row["block"]) for row in rows if "block" in row}
    assert timed >= {(op, block) for op in set(OPS) - WITHOUT_BLOCKS for block in BLOCKS}
    assert {row["op"] for row in rows} >= set(OPS)
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (
            (*STEP, "--contestants", '["row", "galore"]'),
            "contestants: 'galore' is unknown; use some of element",
        ),
        (
            ("bench", "step", "--shape", "huge"),
            "shape='huge': unknown; use one of SmolLM2-135M, Llama-3.2-1B",
        ),
        (
            ("bench", "step", "--attention", "flash"),
            "attention='flash': unknown; use one of auto, eager, sdpa",
        ),
        (("bench", "optimizer", "--rounds", "0"), "rounds=0: must be at least 1"),
    ],
)
def test_wrong_input_is_one_line(arguments: tuple[str, ...], fragment: str, tmp_path: Path) -> None:
    assert fragment in error_line(run_here(*arguments, cache=tmp_path / "cache"))
