"""A base that is spread over two ranks answers as the tasks' merged checkpoints do in one process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import free_port, launch, python, rank_environment
from serving.rank_script import ASKED, LONG
from serving.small import CAP, TASKS, Small

from trace_dist.bank.bank import BASE

SCRIPT = Path(__file__).with_name("rank_script.py")


@pytest.mark.launcher
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
def test_two_ranks_answer_together(backend: str, small: Small, tmp_path: Path) -> None:
    launch(SCRIPT, 2, small.folder, backend, tmp_path, launcher="torchrun")
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    tasks = [task for task in (*TASKS[:3], BASE) for _ in range(3)]
    wanted = [small.expected(task, [text])[0] for task, text in zip(tasks, ASKED, strict=True)]
    assert [answer["text"] for answer in one["answers"]] == wanted
    assert [answer["task"] for answer in one["answers"]] == tasks
    assert one["answers"] == other["answers"]
    # Three answers of each of four tasks: one rank writes two of them, the other one.
    assert (one["written"], other["written"]) == ([2] * 4, [1] * 4)
    assert one["ended"] == other["ended"]
    assert [answer["text"] for answer in one["ended"]] == [text.split("b")[0] for text in wanted]
    assert one["gathered"] == other["gathered"] == [wanted[:1], wanted[:3]]
    # Draws are those of rank 0, though nobody gave a seed.
    assert one["drawn"] == other["drawn"] != wanted
    assert (one["shown"], other["shown"]) == ([wanted[0], wanted[0]], [wanted[0], ""])
    assert "".join(one["pieces"]) == "".join(other["pieces"]) == wanted[0]
    assert one["cut"] == other["cut"]
    assert one["cut"]["num_tokens"] < LONG
    assert one["kept"] is other["kept"] is True


@pytest.mark.launcher
def test_the_command_writes_once(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    command = [python(), "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "-m", "trace_dist", "generate", "--backend", "fsdp2"]
    command += ["--bank", str(small.bank), "--base", str(small.base), "--max_new_tokens", str(CAP)]
    for words in (["--output", str(out)], []):
        done = subprocess.run(
            [*command, *words, "--prompt", *ASKED[:2]],
            env=rank_environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-6000:]
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == small.expected(
        "copy", ASKED[:2]
    )
    assert done.stdout.count("error bound") == 1
