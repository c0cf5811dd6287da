"""What the tutorials say of configurations, launchers and files is so; what they run is in test_installed.py."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from tutorials.pages import PAGES, ROOT, blocks, commands, table_cells, words

from trace_dist.cli.parser import parse, run_config
from trace_dist.config import RunConfig
from trace_dist.parts import METHODS


def keys_of(section: type, before: str = "") -> Iterator[str]:
    """Every key of a section and of the sections in it; those of a list's entries are named as if they were the list's."""
    hints = get_type_hints(section)
    for field in fields(section):  # type: ignore[arg-type]
        name = f"{before}{field.name}"
        yield name
        kinds = [hints[field.name], *get_args(hints[field.name])]
        for kind in kinds:
            if isinstance(kind, type) and is_dataclass(kind):
                yield from keys_of(kind, f"{name}.")


def known_keys() -> set[str]:
    """Keys of a run, and the options of its methods."""
    found = set(keys_of(RunConfig))
    for method in ("full", "lora"):
        options: Any = METHODS.load(method).Options
        found |= {f"continual.options.{method}.{field.name}" for field in fields(options)}
    return found


def test_keys_of_the_table_are_keys_here() -> None:
    cells = table_cells("coming-from", 0)
    ours = [cell for cell in cells if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+|run_dir|seed|backend", cell)]
    # the last table has their keys in its first column
    theirs = set(cells[cells.index("num_train_epochs") :])
    wrong = {key for key in ours if key not in theirs} - known_keys()
    assert not wrong
    assert len(set(ours) - theirs) > 40


def test_keys_in_prose_are_keys_here() -> None:
    """In all tutorials: what looks like a key of a section, in code font."""
    sections = {key for key in known_keys() if "." not in key}
    for page in PAGES.glob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        keys = {
            code for code in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)`", text) if code.split(".")[0] in sections
        }
        assert not keys - known_keys(), page


def test_the_two_configurations_say_the_same(tmp_path: Path) -> None:
    """Ours is one; what the other says in its words, it says in ours."""
    theirs, ours = (yaml.safe_load(text) for language, text in blocks("coming-from") if language == "yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(ours))
    cfg = run_config(parse(["run", "--config", str(tmp_path / "run.yaml")])["run"])
    assert cfg.target.path == theirs["model_name_or_path"]
    assert cfg.data.max_length == theirs["cutoff_len"]
    assert cfg.train.micro_batch_size == theirs["per_device_train_batch_size"]
    accumulated = cfg.train.micro_batch_size * theirs["gradient_accumulation_steps"] * cfg.launch.num_ranks
    assert cfg.train.batch_size == accumulated
    assert (cfg.train.warmup_steps, cfg.tasks[0].steps) == (theirs["warmup_steps"], theirs["max_steps"])


@pytest.mark.parametrize("page", ["your-own-model", "second-task", "serve-it", "on-a-cluster"])
def test_commands_are_ones_that_the_program_takes(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [
        line for block in blocks(page) if block.language == "bash" for line in commands(block, {"MODEL": "m"})
    ]
    ours = [*map(list, dict.fromkeys(tuple(words(line)) for line in lines if words(line)))]
    # Files that the pages themselves make are not there.
    parsed = [parse(one) for one in ours if "mine.yaml" not in one and "prices.yaml" not in one]
    assert len(parsed) > 1 or page == "serve-it"
    assert {one.command for one in parsed} <= {"run", "train", "init", "bank", "mask", "generate", "serve"}


def test_the_launchers_of_the_page(tmp_path: Path) -> None:
    """Each script is there, takes the page's arguments and hands them on; the launchers are stand-ins that say what they got."""
    script = '[ "${0##*/}" = scontrol ] && echo node-1 && exit\necho "${0##*/}" "$@"\n'
    for name in ("deepspeed", "torchrun", "accelerate", "srun", "scontrol", "trace-dist"):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    slurm |= {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    lines = [
        line for block in blocks("on-a-cluster") if block.language == "bash" for line in commands(block, {})
    ]
    scripts = [line for line in lines if "launch/" in line]
    named = {word for line in scripts for word in line.split() if word.startswith("launch/")}
    assert {
        "launch/deepspeed.sh",
        "launch/multi_node.sh",
        "launch/slurm.sbatch",
        "launch/hostfile.example",
    } <= named
    assert not [name for name in named if not (ROOT / name).is_file()]
    for line in scripts:
        command = shlex.split(line)
        if command[0] == "sbatch":  # what it starts on the first node; its own options are Slurm's
            command = ["bash", *command[command.index("launch/slurm.sbatch") :]]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f" {' '.join(words(line))}" in done.stdout, line


def test_the_first_yaml_of_the_page_is_what_init_writes() -> None:
    (written,) = [yaml.safe_load(text) for language, text in blocks("on-a-cluster") if language == "yaml"]
    from trace_dist.stages.starter import _ranks

    assert yaml.safe_load(_ranks(8)) == written
