"""The examples of docs/examples run as their first line says, learn, and change what the mask allows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from launching import free_port, python, rank_environment

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
TORCHRUN = ("torch.distributed.run", "--nproc_per_node", "2", "--master_port")
ACCELERATE = (
    *("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
)
LAUNCHES = {"bare_loop": TORCHRUN, "hf_trainer": TORCHRUN, "accelerate_loop": ACCELERATE}


@pytest.mark.launcher
@pytest.mark.parametrize("name", LAUNCHES)
def test_on_two_ranks(name: str) -> None:
    command = [python(), "-m", *LAUNCHES[name], str(free_port()), str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    losses = [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.1
    changed, masked = map(int, re.findall(r"(\d+) entries changed, (\d+) are masked", done.stdout)[0])
    assert 0.9 * masked < changed <= masked


def test_every_example_is_tested_and_short() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert sources.keys() == LAUNCHES.keys()
    assert all(len(source.splitlines()) < 60 for source in sources.values())
