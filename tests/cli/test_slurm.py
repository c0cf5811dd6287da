"""launch/slurm.sbatch, under stand-ins: srun only starts processes, and scontrol only notes what it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cli.program import environment, make_config, processes_with, write_config, write_tasks
from launching import python

pytestmark = pytest.mark.launcher
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[1:]
tasks = int(words[words.index("--ntasks") + 1])
command = words[words.index("--export=ALL") + 1:]
step = {{"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": "1"}}
own = [{{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}} for task in range(tasks)]
begun = [subprocess.Popen(command, env=os.environ | step | each) for each in own]
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: [each.send_signal(number) for each in begun])
sys.exit(max(abs(each.wait()) for each in begun))
"""
SCONTROL = '#!/bin/sh\necho "$@" >>"$TEST_FOLDER/scontrol"\n'
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": "0"}


def test_a_job_whose_time_is_up_goes_back_into_the_queue_with_a_checkpoint(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN.format(python=python())), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    write_tasks(tmp_path)
    config = make_config(tmp_path)
    config["train"] |= {"steps": 1_000_000, "log_every": 1, "checkpoint_every": 1_000_000}
    write_config(tmp_path, config)
    mask = "model.layers.0.mlp.up_proj.weight"
    write_mask(tmp_path / "mask.safetensors", mask)
    own = environment(tmp_path / "cache") | JOB | {"TEST_FOLDER": str(tmp_path)}
    own |= {"PATH": f"{tmp_path / 'bin'}:{own['PATH']}", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    words = ["train", "--config", "config.yaml", "--mask_file", "mask.safetensors"]
    job = subprocess.Popen(
        ["bash", SCRIPT, *words],
        env=own,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and '"train/copy"' in metrics.read_text()) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 75, said[-3000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    (kept,) = (tmp_path / "run" / "checkpoints" / "train" / "copy").iterdir()
    step = int(kept.name.removeprefix("step-"))
    assert f"stopped as asked: train/copy: step {step} of 1000000 is done and kept" in said
    assert processes_with(str(tmp_path)) == []


def write_mask(path: Path, name: str) -> None:
    import torch

    from trace_dist.masks import Mask, UnitLayout

    units = torch.arange(48, dtype=torch.int32)
    Mask({name: units}, {name: UnitLayout((48, 32), 32)}, "row").save(path)
