"""What a checkpoint costs: turns of full fine-tuning in this process. Nothing here looks at a clock's reading."""

from __future__ import annotations

from pathlib import Path

from trace_dist.benchmarks.checkpoint import FULL, MODES, WARM_UP, measure
from trace_dist.benchmarks.contestants import Race
from trace_dist.checkpoint import latest_checkpoint


def test_every_mode_takes_its_turn_and_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    row = measure(FULL, Race("tiny", micro_batch=1, sequence=8), rounds=2, steps=1, root=tmp_path)
    # the last turn, beside training, begins after all the others
    last = 2 * WARM_UP + 2 * len(MODES) - 1
    assert latest_checkpoint(tmp_path) == tmp_path / f"step-{last:08d}"
    assert row["bytes"] == sum(path.stat().st_size for path in (tmp_path / f"step-{last:08d}").iterdir())
    for mode in MODES[1:]:
        assert len(row[mode]["turns"]) == 2
        assert row[mode]["stall_s"] > 0
        assert row[mode]["stall_steps"] == row[mode]["stall_s"] / row["step_s"]
