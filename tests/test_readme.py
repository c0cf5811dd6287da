"""The README's commands, as they stand there, on a smaller copy of the quickstart; and its Python example."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from bank.samples import drawn, small_delta
from cli.program import run_here
from launching import free_port, python, rank_environment

from trace_dist import DeltaBank
from trace_dist.bank.bank import BASE
from trace_dist.cli.arguments import FILE_COMMANDS
from trace_dist.cli.bank_commands import ACTIONS, bank_command
from trace_dist.cli.parser import parse, run_config
from trace_dist.models.fingerprint import fingerprint
from trace_dist.report import load_results
from trace_dist.report.markdown import insert, markdown_table
from trace_dist.stages.base import prepare_base

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BANK_PAGE = (ROOT / "docs/living-with-a-bank.md").read_text()
MAKE = "make "  # set-up targets: run by .ci/run (test) or by hand (quickstart), they take minutes


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str = README) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash", page) for line in block.splitlines()]
    return [line for line in lines if line]


def shrink(config: dict) -> dict:
    """The quickstart with models, data and steps small enough for a test."""
    for model in ("target", "proxy"):
        config[model]["tiny"] |= {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
        config[model]["tiny"] |= {"steps": 4, "batch_size": 8}
    for task in (*config["tasks"], *config["general"]):
        task |= {"num_train": 60, "num_test": 6}
        task.pop("steps", None)
    config["train"] = {"steps": 4, "batch_size": 8, "micro_batch_size": 8}
    config["probe"] = {"steps": 2, "batch_size": 8, "fisher_batches": 1}
    config["projection"] = {"options": {"steps": 2}}
    config["bank"] = {"layer": 0, "num_prompts": 20, "clusters": 1}
    config["continual"] = {
        "methods": ["retrieved", "consolidated"],
        "options": {"consolidated": {"prompts": 20}},
    }
    return config


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, with the smaller configuration in place of the quickstart's."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "configs").mkdir()
    config = shrink(yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text()))
    (folder / "configs/quickstart.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    wanted = [line.removeprefix(MAKE) for line in commands() if line.startswith(MAKE)]
    assert wanted == ["quickstart", "test"]
    assert all(f"\n{target}:" in makefile for target in [*wanted, "quickstart-smollm2"])


@pytest.mark.parametrize("section", ["quickstart", "smollm2"])
def test_tables_are_those_of_the_committed_results(section: str) -> None:
    results = load_results(ROOT / f"docs/results/{section}.json")
    assert insert(README, section, markdown_table(results)) == README


@pytest.mark.launcher
@pytest.mark.timeout(1800)  # twenty commands, each of which has a limit of its own
def test_commands_run_one_after_the_other(checkout: Path) -> None:
    environment = rank_environment() | {"PYTHONPATH": "", "HF_DATASETS_CACHE": str(checkout / "cache")}
    environment["PATH"] = f"{Path(python()).parent}{os.pathsep}{environment['PATH']}"
    for command in (line for line in commands() if not line.startswith(MAKE)):
        environment["MASTER_PORT"] = str(free_port())
        if "deepspeed" in command or "torchrun" in command:
            flag = "--master_port"
            command = re.sub(
                r"(--num_gpus 2|--nproc_per_node 2)", rf"\1 {flag} {environment['MASTER_PORT']}", command
            )
        if "bench step" in command:
            # All contestants train in benchmarks/test_contestants.py; each takes launches of its own here.
            command += " --contestants [row]"
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    run = checkout / "runs/quickstart"
    assert {path.stem for path in (run / "deltas").iterdir()} == {"reverse", "spiral", "rotate"}
    for name in ("results.json", "report.html", "config.yaml", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    for model in ("reverse-merged", "one-model"):
        assert (checkout / f"runs/{model}/model.safetensors").is_file()


@pytest.mark.launcher
def test_python_example(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs after the commands have made the model that the example loads."""
    if not (checkout / "runs/quickstart/models/target").is_dir():
        pytest.skip("the commands of the README did not run before")
    import torch

    monkeypatch.chdir(checkout)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ids = torch.randint(5, 15, (2, 8))
    (code,) = blocks("python")
    scope: dict = {"batches": [{"input_ids": ids, "labels": ids}] * 2}
    exec(compile(code, "README.md", "exec"), scope)
    assert (checkout / "tuned/model.safetensors").is_file()
    assert scope["optimizer"].grad_norm > 0


def words(line: str) -> list[str]:
    """The arguments of a command line, however it is started."""
    return shlex.split(re.sub(r"^.*?(trace-dist|--module trace_dist|-m trace_dist) ", "", line))


@pytest.fixture
def banks(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart's models and its bank, another one of the same base, and the page's configurations."""
    monkeypatch.chdir(tmp_path)
    for name, configuration in zip(("task", "other"), blocks("yaml", BANK_PAGE), strict=True):
        Path(f"{name}.yaml").write_text(configuration)
    config = Path("runs/quickstart/config.yaml")
    config.parent.mkdir(parents=True)
    config.write_text((checkout / "configs/quickstart.yaml").read_text())
    cfg = run_config(parse(["run", "--config", str(config)])["run"])
    for role in ("target", "proxy"):
        prepare_base(cfg, role)
    base = fingerprint(cfg.target.path)
    for name, tasks in (("quickstart", ["reverse", "spiral", "rotate"]), ("other", ["copy"])):
        bank = DeltaBank.create(Path("runs") / name / "bank", base, layer=1)
        bank.add(drawn(BASE, 0), None)
        for task in tasks:
            bank.add(drawn(task, len(task)), small_delta(task, len(task), model=base))


@pytest.mark.usefixtures("banks")
def test_the_bank_page_is_true(tmp_path: Path) -> None:
    """Every command is one that the program takes. What trains nothing is carried out, in the page's order.

    That is `init`, whether a task can be learned, and what keeps a bank in order.
    """
    bank, parsed = Path("runs/quickstart/bank"), []
    for line in commands(BANK_PAGE):
        one = parse(words(line))
        parsed.append(one)
        if one.command == "init" or "--dry_run" in line:
            done = run_here(*words(line), cache=tmp_path / "cache")
            assert done.returncode == 0, done.stderr
        elif one.command == "learn" and "deepspeed" not in line:
            # What it would train is trained elsewhere; it is added here as it would be.
            cfg = run_config(one.learn)
            learning = DeltaBank(cfg.bank_of().root)
            (task,) = (task.name for task in cfg.tasks)
            if task not in learning.tasks:
                learning.add(drawn(task, len(task)), small_delta(task, len(task), model=learning.base))
        elif one.command == "bank" and one.bank.action != "export":
            # The export needs a delta of the model; it is among the commands of the README.
            bank_command(one.bank)
    assert {one.command for one in parsed} == {
        "init",
        "run",
        "learn",
        "eval",
        "bank",
        "generate",
        "consolidate",
    }
    actions = [one.bank for one in parsed if one.command == "bank"]
    assert {one.action for one in actions} == set(ACTIONS)
    assert DeltaBank(bank).tasks == [BASE, "backwards", "spiral", "vowels", "copy"]
    assert DeltaBank(Path("runs/both")).tasks == [BASE, "backwards", "spiral", "vowels", "copy"]


def test_what_init_shows_is_what_its_help_shows() -> None:
    """One example in both places, of data that come with the package."""
    (line,) = (line for line in commands(BANK_PAGE) if " init " in line)
    assert FILE_COMMANDS["init"].example == line.removeprefix("trace-dist ")


def test_the_table_of_other_methods_is_that_of_the_results() -> None:
    page = (ROOT / "docs/how-it-works.md").read_text()
    results = json.loads((ROOT / "docs/results/quickstart_methods.json").read_text())
    final = {name: [*mode["R"][-1], mode["average_accuracy"]] for name, mode in results["methods"].items()}
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name: numbers for name, *numbers in rows} == {
        name: [f"{number:.1f}" for number in numbers] for name, numbers in final.items()
    }


def test_what_one_set_of_weights_keeps_is_what_the_study_found() -> None:
    study = json.loads((ROOT / "docs/results/study_one_model_toy.json").read_text())
    average = {name: method["average"] for name, method in study["methods"].items()}
    runs = {name: {run["seed"] for run in method["runs"]} for name, method in study["methods"].items()}
    above = {name: method["ours_above"] for name, method in study["methods"].items()}
    said = " ".join(README.split())
    one_after_the_other = ("ella", "osft", "olora", "full", "lora", "slao", "ps")
    some = [average[name] for name in one_after_the_other]
    assert (
        f"`consolidated` {average['consolidated']:.1f} %, level with a model per task ({average['separate']:.1f} %) and with "
        f"joint training ({average['joint']:.1f} %); ELLA, OSFT, O-LoRA, full fine-tuning, LoRA, SLAO and PS {min(some):.0f} to "
        f"{max(some):.0f} %; averaged or TIES-merged deltas less than 1 %. TRACE's recipe, which retrieves, reaches "
        f"{average['trace']:.0f} %."
    ) in said
    assert max(average["average"], average["ties"]) < 1
    assert "with three seeds in two orders" in said
    assert study["complete"]
    assert all(len(found) == 3 for found in runs.values())
    assert all(len(method["runs"]) == 6 for method in study["methods"].values())
    # What the study's page says beyond doubt, and what it does not.
    verdicts = {name: found["verdict"] for name, found in above.items() if found is not None}
    assert {name for name, verdict in verdicts.items() if verdict == "undecided"} == {
        "retrieved",
        "separate",
        "joint",
    }
    assert {name for name, verdict in verdicts.items() if verdict == "above"} == {
        *one_after_the_other, "trace", "average", "ties"
    }  # fmt: skip


def test_what_masks_of_two_widths_reach_is_what_the_study_found() -> None:
    study = json.loads((ROOT / "docs/results/study_two_widths.json").read_text())

    def decided(arm: str, density: float, other_density: float | None = None) -> tuple[int, int, int]:
        """Tasks on which the arm ends lower than random beyond doubt, those on which it ends higher, and all."""
        kind = (arm, density, "random", other_density or density)
        row = next(
            row
            for row in study["differences"]
            if (row["arm"], row["density"], row["other"], row["other_density"]) == kind
        )
        verdicts = [task["verdict"] for task in row["tasks"]]
        return verdicts.count("lower"), verdicts.count("higher"), len(verdicts)

    page = (ROOT / "docs/two-widths.md").read_text()
    for text in (README, page):
        assert "five of ten tasks" in " ".join(text.split())
    assert decided("probed", 1e-3) == (5, 1, 10)
    assert decided("projected", 1e-3) == decided("narrowed", 1e-3) == (4, 1, 10)
    assert decided("probed", 1e-4) == decided("projected", 1e-4) == (1, 2, 10)
    assert decided("probed", 1e-3, 1e-2) == (0, 7, 10)
    assert decided("probed", 1e-4, 1e-3) == (0, 5, 10)
    assert study["complete"]
    ablations = {cell["arm"] for cell in study["cells"] if cell["seeds"] < 3}
    assert decided("probed_evenly", 1e-4) == (2, 0, 10)
    assert decided("probed_floored", 1e-4) == (3, 1, 10)
    spread = {"probed_evenly", "probed_floored"}
    assert ablations == {"align", "budgets", "places"} | spread
    shares = {
        row["arm"]: row["share"] for row in study["shares"] if (row["of"], row["density"]) == ("probed", 1e-3)
    }
    assert {arm: round(100 * share["value"]) for arm, share in shares.items()} == {
        "projected": 94,
        "align": 54,
        "budgets": 24,
        "places": 46,
    }
    assert [arm for arm, share in shares.items() if share["high"] > 0.8] == ["projected"]


@pytest.mark.parametrize("page", [README, *(path.read_text() for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert any((folder / target).exists() for folder in (ROOT, ROOT / "docs")), target
