"""Batches on a real process group: shares by the group's ranks, and ranks with different data are refused."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import datasets
from launching import free_port, python, rank_environment

from trace_dist.data import Batches

SCRIPT = Path(__file__).with_name("rank_script.py")
ROOT = Path(__file__).parents[2]


def test_two_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    env = rank_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": "2"}
    command = [python(), str(SCRIPT), str(tmp_path)]
    ranks = [subprocess.Popen(command, env={**env, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))

    rows = [{"input_ids": [i, i], "labels": [-100, i], "num_answer_tokens": 1} for i in range(1, 8)]
    whole = Batches(
        datasets.Dataset.from_list(rows), batch_size=5, micro_batch_size=5, seed=0, pad_id=0, world_size=1
    )
    expected = [next(whole).micro_batches[0]["input_ids"][:, 0].tolist() for _ in range(3)]
    assert [a + b for a, b in zip(first["shares"], second["shares"], strict=True)] == expected
    assert [len(share) for share in first["shares"]] == [3, 3, 3]
    for error in (first["error"], second["error"]):
        assert re.match(
            r"training data: rank 0 has \['\w+'\], rank 1 has \['\w+'\]: the ranks differ; start every", error
        )
    for error in (first["other_labels"], second["other_labels"]):
        assert error.startswith("training data: rank 0 has ")
    for error in (first["other_size"], second["other_size"]):
        assert error.startswith("micro_batch_size: rank 0 has 1, rank 1 has 2: the ranks differ")
