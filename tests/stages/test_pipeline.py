"""The quickstart at reduced size, through the real DeepSpeed launcher: killed, continued, and started once more."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.program import environment, processes_with, wait_for
from launching import python

from trace_dist.bank.bank import DeltaBank
from trace_dist.masks import Mask
from trace_dist.models.fingerprint import fingerprint
from trace_dist.sharding.build import load_sharded

pytestmark = pytest.mark.launcher

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MODES = ["retrieved", "consolidated", "random", "full", "lora"]
SECRETS = {
    name: f"hf_{name.lower()}_geheim"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "TRACE_DIST_API_KEY", "AWS_SECRET_ACCESS_KEY")
}
"""Of the environment of a run."""
OVERRIDES = [
    *("--probe.steps", "4", "--probe.fisher_batches", "1", "--projection.options.steps", "4"),
    *("--train.batch_size", "8", "--train.warmup_steps", "2", "--bank.num_prompts", "30"),
]


@dataclass(frozen=True)
class Run:
    """What the starts of one run left and said."""

    folder: Path
    names: list[str]
    killed: subprocess.CompletedProcess[str]
    second: subprocess.CompletedProcess[str]
    killed_hard: subprocess.CompletedProcess[str]
    continued: subprocess.CompletedProcess[str]
    again: subprocess.CompletedProcess[str]
    orphans: list[list[int]]
    kept_times: tuple[float, float]
    stage_files: tuple[str, str]

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.folder / "results.json").read_text())


def reduced(folder: Path) -> dict[str, Any]:
    """The quickstart's own file with fewer tasks, examples and steps, and its files in ``folder``."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config["run_dir"] = str(folder)
    for role, hidden_size in (("target", 32), ("proxy", 16)):
        config[role]["path"] = str(folder / "models" / role)
        config[role]["tiny"] |= {"hidden_size": hidden_size, "num_layers": 2, "intermediate_size": 48}
        config[role]["tiny"] |= {"steps": 6, "batch_size": 8}
    config["tasks"], config["general"] = config["tasks"][:2], config["general"][:1]
    for task in config["tasks"] + config["general"]:
        task |= {"num_train": 80, "num_test": 8}
    for task in config["tasks"]:
        task["steps"] = 6
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("pipeline")
    folder = root / "run"
    config = reduced(folder)
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    command = [python(), "-m", "trace_dist", "run", "--config", str(root / "config.yaml"), *OVERRIDES]
    own = environment(root / "cache") | SECRETS
    options: dict[str, Any] = {"env": own, "text": True, "cwd": root}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}

    made = folder / "probe" / "specificity.json"
    killed, orphans, second = [], [], None
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command, **options, **pipes)
        # Killed while the ranks of the next stage are at work, so that they must be stopped too.
        found = wait_for(lambda process=process: process.poll() is not None or made.is_file(), 300)
        ranks = wait_for(lambda: len(processes_with(f"--config {folder}")) > 2, 60)
        second = second or subprocess.run(command, **options, **pipes, timeout=60)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert found, output
        assert ranks, output
        killed.append(subprocess.CompletedProcess(command, process.returncode, output))
        wait_for(lambda: not processes_with(str(folder)), 20)
        orphans.append(processes_with(str(folder)))
    before = made.stat().st_mtime

    continued = subprocess.run(command, **options, **pipes, timeout=500)
    assert continued.returncode == 0, continued.stdout[-6000:]
    stages = (folder / "stages.json").read_text()
    again = subprocess.run(command, **options, **pipes, timeout=200)
    return Run(
        folder,
        [task["name"] for task in config["tasks"]],
        killed[0],
        second,
        killed[1],
        continued,
        again,
        orphans,
        (before, made.stat().st_mtime),
        (stages, (folder / "stages.json").read_text()),
    )


def test_no_token_or_key_is_written_or_said(run: Run) -> None:
    """Into no file of the run folder: logs, results, report, configuration, checkpoints, bank."""
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"report.html", "results.json"} <= {path.name for path in files}
    assert any(path.parent.name == "logs" for path in files)
    said = "".join(
        each.stdout for each in (run.killed, run.killed_hard, run.second, run.continued, run.again)
    )
    for secret in SECRETS.values():
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_killed_run_takes_its_ranks_with_it(run: Run) -> None:
    assert run.killed.returncode == 128 + signal.SIGTERM
    assert run.killed_hard.returncode == -signal.SIGKILL
    assert run.orphans == [[], []]


def test_a_second_run_in_the_same_folder_is_refused(run: Run) -> None:
    assert run.second.returncode == 2
    assert f"error: run_dir='{run.folder}': process " in run.second.stdout
    assert "is at work in it; wait for it, end it, or choose another run_dir" in run.second.stdout


def test_a_killed_run_continues_with_what_was_missing(run: Run) -> None:
    assert re.search(r"^probe +.*loss \d", run.killed.stdout, re.MULTILINE)
    assert re.search(r"^probe +kept$", run.continued.stdout, re.MULTILINE)
    assert re.search(r"^project retrieved +retrieved: .* %", run.continued.stdout, re.MULTILINE)
    assert run.kept_times[0] == run.kept_times[1]


def test_a_finished_run_does_nothing_but_report(run: Run) -> None:
    assert run.again.returncode == 0, run.again.stdout
    kept = [line.split("  ")[0] for line in run.again.stdout.splitlines() if line.endswith(" kept")]
    assert kept == [
        "base target",
        "probe",
        "project retrieved",
        "memory",
        "consolidated",
        "random",
        "full",
        "lora",
    ]
    assert run.stage_files[0] == run.stage_files[1]
    lines = run.again.stdout.splitlines()
    assert f"report: {run.folder / 'report.html'}" in lines
    *_, show, ask, _, fold, score = lines
    assert show == f"next: trace-dist bank show {run.folder / 'bank'}"
    assert ask.split()[:2] == ["trace-dist", "generate"]
    assert fold.split()[:2] == ["trace-dist", "consolidate"]
    assert "--module trace_dist eval --config" in score


def test_the_launchers_chatter_is_in_the_logs(run: Run) -> None:
    """What is shown of a whole run are its own lines and the table; a launcher and two ranks say far more."""
    shown = run.continued.stdout.splitlines()
    logs = {path.stem: path.read_text() for path in (run.folder / "logs").iterdir()}
    assert {"base-target", "probe", "project-retrieved", "memory", "full", "lora"} <= logs.keys()
    assert len(logs["project-retrieved"].splitlines()) > 10
    assert not [line for line in shown if "launch" in line.lower() and "trace_dist eval" not in line]


def test_results_have_the_shape_of_the_design(run: Run) -> None:
    results = run.results
    assert results["tasks"] == run.names
    assert sorted(results["modes"]) == sorted(MODES)
    for method, mode in results["modes"].items():
        scores = torch.tensor(mode["R"])
        assert scores.shape == (len(run.names) + 1, len(run.names))
        assert bool(((scores >= 0) & (scores <= 100)).all())
        assert mode["average_accuracy"] == pytest.approx(float(scores[-1].mean()))
        assert {"forgetting", "just_trained", "losses", "density", "trainable"} <= mode.keys()
        # as long as the tasks together, and a quarter of general examples on top
        steps = [8, 16] if method == "consolidated" else [6, 6]
        assert [len(mode["losses"][name]) for name in run.names] == steps
    bases = [mode["R"][0] for mode in results["modes"].values()]
    assert all(base == bases[0] for base in bases)
    assert 0 <= results["retrieval"]["accuracy"] <= 100
    memory = results["memory"]["bytes_per_param"]
    assert 2 < memory["masked"] < memory["full"]
    for kind, predicted in results["memory"]["predicted_bytes_per_param"].items():
        assert memory[kind] == pytest.approx(predicted, rel=0.05), kind
    assert {"run_info", "meta_info", "config", "masks", "specificity"} <= results.keys()
    assert results["run_info"]["num_ranks"] == 2
    assert results["modes"]["retrieved"]["density"] == pytest.approx(0.05, abs=1e-3)
    assert results["modes"]["random"]["density"] == pytest.approx(0.05, abs=1e-3)


def test_the_report_is_one_page_on_its_own(run: Run) -> None:
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in run.names)
    assert "<script src" not in page
    assert "<link" not in page
    assert any(
        "average" in line.lower() or "forget" in line.lower() for line in run.again.stdout.splitlines()
    )


def test_deltas_change_masked_entries_and_nothing_else(run: Run) -> None:
    target = run.folder / "models" / "target"
    model = load_sharded(str(target), "float32")
    base = model.full_state_dict()
    bank = DeltaBank(run.folder / "bank")
    assert bank.base == fingerprint(target)
    for name in run.names:
        mask = Mask.load(run.folder / "masks" / f"{name}.safetensors")
        delta = bank.delta(name)
        assert delta is not None
        assert delta.mask == mask
        with bank.activated(model, name):
            tuned = model.full_state_dict()
        moved = 0
        for parameter in model.names():
            changed = tuned[parameter] != base[parameter]
            allowed = mask.dense(parameter) if parameter in mask.layouts else torch.zeros_like(changed)
            assert not (changed & ~allowed).any(), parameter
            moved += int(changed.sum())
        assert moved > 0.5 * mask.num_entries
    after = model.full_state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.items())


def test_the_masks_of_a_run(run: Run) -> None:
    """Every task has its own, of the wanted density, for this model; random ones beside them."""
    for kind in ("", "random/"):
        masks = [Mask.load(run.folder / "masks" / f"{kind}{name}.safetensors") for name in run.names]
        assert masks[0] != masks[1]
        for mask, name in zip(masks, run.names, strict=True):
            assert abs(mask.num_entries - 0.05 * mask.num_maskable) <= 1
            assert mask.meta["task"] == name
            assert mask.meta["model"] == fingerprint(run.folder / "models" / "target")


def test_every_training_left_metrics(run: Run) -> None:
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    tags = {record["tag"] for record in records}
    assert {f"{mode}/{name}" for mode in MODES for name in run.names} <= tags
    assert {"base/target", "base/proxy"} <= tags
    assert list((run.folder / "tensorboard").rglob("events.out.tfevents.*"))
