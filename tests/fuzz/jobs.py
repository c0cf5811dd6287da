"""Readers of what tells a job where and how it runs, and of what it was started with."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml
from cli.program import make_config
from fuzz.reader import Reader, record_signed
from report.samples import make_results

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import RunConfig
from trace_dist.launching.commands import first_node
from trace_dist.launching.environment import RANKS
from trace_dist.launching.hosts import read_hostfile
from trace_dist.stages.report import collect_results
from trace_dist.stages.start import keep_config
from trace_dist.studies.records import Cell, Journal
from trace_dist.utils import network
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.launch import adopt_launch, job_size, launched_rank


def make_hosts(folder: Path) -> Path:
    (folder / "hosts").write_text("# both\nnode-1 slots=8 # the first\n\n10.0.0.2  slots=16\n")
    return folder / "hosts"


def make_variables(folder: Path) -> Path:
    """Of a rank that srun has started."""
    names = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    names |= {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-1,node-2"}
    write_json(folder / "variables.json", names | {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"})
    return folder / "variables.json"


def read_variables(path: Path) -> None:
    found = read_json(path)
    if not isinstance(found, dict) or not all(re.fullmatch("[A-Z_]+", name) for name in found):
        raise ValueError(f"{path}: no variables of a process can be made of it")
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    with patch.dict(os.environ, kept, clear=True):
        for name, value in found.items():
            os.environ[name] = str(value)
        launched_rank()
        first_node(os.environ)
        network.spans_hosts(), job_size()
        adopt_launch()
        network.spans_hosts()


@cache
def run() -> RunConfig:
    """Of two methods, as a command line gives it."""
    with TemporaryDirectory() as name:
        path = Path(name) / "run.yaml"
        path.write_text(yaml.safe_dump(make_config(Path(name))))
        return run_config(parse(["run", "--config", str(path)])["run"])


def make_kept(folder: Path) -> Path:
    """A run folder with a result, which another configuration may not meet."""
    plain = json.loads(json.dumps(asdict(replace(run(), run_dir=str(folder)))))
    (folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    write_json(folder / "eval.json", {})
    return folder / "config.yaml"


def read_kept(path: Path) -> None:
    keep_config(replace(run(), run_dir=str(path.parent)), whole_run=False)


def make_gathered(folder: Path) -> Path:
    """A method's result in the folder of its run."""
    (folder / "methods").mkdir()
    result = make_results([task.name for task in run().tasks])["modes"]["retrieved"]
    more: dict[str, Any] = {"general_names": ["sum"], "measured": {"date": "d", "commit": "c"}}
    write_json(folder / "methods" / "retrieved.json", result | more)
    return folder / "methods" / "retrieved.json"


def read_gathered(path: Path) -> None:
    folder = path.parents[1]
    write_json(folder / "results.json", collect_results(replace(run(), run_dir=str(folder))))


ABOUT = {"one": "digest", "two": "digest"}


def make_journal(folder: Path) -> Path:
    journal = Journal(folder / "records.jsonl", ABOUT)
    journal.append({"kind": "base", "task": "one", "tokens": [1, 2]})
    journal.append({"kind": "mask", "arm": "probed", "task": "one", "seed": 0, "seconds": 1.5})
    trial = {
        "kind": "trial",
        "arm": "probed",
        "task": "one",
        "density": 0.1,
        "seed": 0,
        "lr": 1e-3,
        "validation": 0.5,
    }
    trial |= {"losses": [0.5, 0.25], "right": [True, False], "text": None, "entries": 7, "train_flops": 1e9}
    for lr in (1e-3, 3e-3):
        journal.append(trial | {"lr": lr, "train_s": 1.0, "seconds": 2.0})
    return journal.path


def read_journal(path: Path) -> None:
    found = Journal(path, ABOUT).read()
    found.best(Cell("probed", "one", 0.1)), found.num_trials, found.seconds


READERS = (
    Reader("hosts of a job", "text", make_hosts, read_hostfile),
    Reader("variables of a launcher", "json", make_variables, read_variables),
    Reader("configuration of a run folder", "yaml", make_kept, read_kept),
    Reader("result of a method, for the report", "json", make_gathered, read_gathered),
    Reader("records of a study", "lines", make_journal, read_journal, record_signed, leaves_out=True),
)
