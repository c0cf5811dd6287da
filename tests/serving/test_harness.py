"""lm-evaluation-harness over a bank: what it scores is what each task's merged checkpoint gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving.small import Small, prompts

from trace_dist.bank.bank import BASE
from trace_dist.cli.parser import parse
from trace_dist.cli.serving_commands import lm_eval_command

pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install 'trace-dist[lm-eval]'")
COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}"}
TASKS: dict[str, dict[str, Any]] = {
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "chosen": {
        "output_type": "multiple_choice",
        "doc_to_choice": ["abc", "fed"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    "running": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def evals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the harness's tasks, with data of two of the bank's tasks and of its base."""
    folder = tmp_path_factory.mktemp("evals")
    texts = [text for task in ("copy", BASE, "twist") for text in prompts(task, 3, seed=1)]
    (folder / "test.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    data = {"data_files": {"test": str(folder / "test.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, own in TASKS.items():
        task = COMMON | {"task": name, "dataset_kwargs": data} | own
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def answers(model: Any, evals: Path, arguments: str = "", **options: Any) -> tuple[dict[str, list[Any]], Any]:
    """The harness's raw answers by its task, and its results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(evals), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, arguments, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
    )
    return {name: [row["resps"] for row in rows] for name, rows in results["samples"].items()}, results


@pytest.fixture(scope="module")
def right(small: Small, evals: Path) -> dict[str, dict[str, list[Any]]]:
    """What the harness's own model gets from the checkpoint of each task."""
    folders = {BASE: small.base, **{task: small.folder / task for task in ("copy", "twist")}}
    return {
        task: answers("hf", evals, f"pretrained={at},tokenizer={small.base}", device="cpu")[0]
        for task, at in folders.items()
    }


def close(one: Any, other: Any) -> bool:
    """Equal, numbers to 1e-4: batches are others."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return (
        one == other if isinstance(one, str | bool) else float(one) == pytest.approx(float(other), abs=1e-4)
    )


def test_each_prompt_is_scored_with_its_own_task(
    small: Small, evals: Path, right: dict[str, dict[str, list[Any]]]
) -> None:
    import trace_dist.serving.harness  # noqa: F401

    found, results = answers("trace-dist", evals, f"bank={small.bank},base={small.base}", batch_size=4)
    for name in TASKS:
        rows = [task for task in ("copy", BASE, "twist") for _ in range(3)]
        assert close(found[name], [right[task][name][place] for place, task in enumerate(rows)]), name
        assert right["copy"][name] != right["twist"][name]
    about = results["config"]
    assert (about["task"], about["generation"]) == ("auto", 4)
    # Of a choice there are two requests.
    assert about["answered"] == {"copy": 12, BASE: 12, "twist": 12}


def test_one_task_answers_everything_and_leaves_the_base(
    small: Small, evals: Path, right: dict[str, dict[str, list[Any]]]
) -> None:
    from trace_dist.serving.harness import BankLM

    model = BankLM(str(small.bank), str(small.base), "twist", batch_size=2)
    found, _ = answers(model, evals)
    assert all(close(found[name], right["twist"][name]) for name in TASKS)
    assert model.router.holds_base()


def test_turns_are_retrieved_as_turns(small: Small) -> None:
    from trace_dist.serving.harness import BankLM

    model = BankLM(str(small.bank), str(small.base))
    model.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    turns = [{"role": "user", "content": prompts("twist", 1)[0]}]
    text = model.apply_chat_template([*turns, {"role": "assistant", "content": "a"}], False)
    assert model._prompt(text) == turns
    assert model._prompt("a text") == "a text"


def test_the_command_runs_the_harness(
    small: Small, evals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["lm-eval", "--bank", str(small.bank), "--base", str(small.base), "--task", "copy", "--"]
    words += [
        "--tasks",
        "chosen",
        "--include_path",
        str(evals),
        "--limit",
        "2",
        "--output_path",
        str(tmp_path),
    ]
    lm_eval_command(parse(words)["lm-eval"])
    assert "|chosen|" in capsys.readouterr().out.replace(" ", "")
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["answered"] == {"copy": 4}
    assert found["config"]["model_args"]["bank"] == str(small.bank)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no options of the harness are given; write them behind --"),
        (["--backend", "zero3", "--", "--tasks", "a"], "backend='zero3': lm-eval runs in one process, with backend=single"),
        (["--task", "no", "--", "--tasks", "chosen"], "task='no': the bank does not hold it; choose among auto, base, copy"),
    ],
)  # fmt: skip
def test_refusals_come_before_the_harness(words: list[str], said: str, small: Small) -> None:
    words = ["lm-eval", "--bank", str(small.bank), "--base", str(small.base), *words]
    with pytest.raises(ValueError, match=said):
        lm_eval_command(parse(words)["lm-eval"])


def test_another_device_is_refused(small: Small) -> None:
    from trace_dist.serving.harness import BankLM

    with pytest.raises(ValueError, match="device='cuda:1': the base is loaded on cpu"):
        BankLM(str(small.bank), str(small.base), device="cuda:1")
