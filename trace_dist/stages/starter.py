"""``trace-dist init``: a commented starter configuration from a model and data files.

What can be read off the data is filled in (columns, metric, lengths, steps); everything else keeps its default, which
``trace-dist run --help`` explains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trace_dist.config import TaskConfig
from trace_dist.config.examples import SCHEME
from trace_dist.data.encoding import encode_pairs
from trace_dist.data.sources import form_of
from trace_dist.data.splits import parts_of
from trace_dist.data.tasks import Task, load_task
from trace_dist.models.loading import load_tokenizer
from trace_dist.profiling.estimate import load_config
from trace_dist.utils.names import AUTO, BASE, MAX_BYTES
from trace_dist.utils.yaml import dump_yaml

_KIND = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet|txt)(\.gz)?$")
FEW_ANSWERS = 10
"""With at most so many distinct answers, and more than one, a task is a choice among them."""
EPOCHS = 3
BATCH_SIZE = 16
FEWEST_STEPS, MOST_STEPS = 50, 1000
PROXY_SHARE = 3
"""A depth-pruned proxy keeps one layer in so many."""


@dataclass(frozen=True)
class Starter:
    """What is known before a configuration is written.

    Attributes:
        model: folder or hub id of the model to train.
        data: a file, folder or hub id per task, in the order in which the tasks arrive.
        proxy: folder or hub id of a small model of the same family; None cuts one out of the model.
        run_dir: folder of the run.
        ranks: GPUs (or processes) on this machine.
        columns: of prompts and answers, by the keys of a task that name them; each counts for the data that have it.
    """

    model: str
    data: Sequence[str]
    proxy: str | None
    run_dir: str
    ranks: int
    columns: Mapping[str, str] = field(default_factory=dict)


def starter_config(starter: Starter) -> str:
    """The text of a commented configuration.

    Raises:
        ValueError: data are missing, malformed or have no columns that are known.
    """
    found = [_task(path, starter.columns) for path in starter.data]
    for key, column in starter.columns.items():
        if all(getattr(config, key) != column for config, _ in found):
            raise ValueError(f"{key}={column!r}: no file of data has this column; name one that is there")
    names = [config.name for config, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data={list(starter.data)}: the tasks are named after their files, {names}; rename one"
        )
    blocks = [
        "# Written by `trace-dist init`. `trace-dist run --help` explains every key.",
        "# Look first: trace-dist run --config FILE --dry_run true",
        _section("Receives results, masks, deltas, the bank and the report.", {"run_dir": starter.run_dir}),
        _ranks(starter.ranks),
        _section("The model that learns; bfloat16 keeps an fp32 copy of the trained entries alone.",
                 {"target": {"path": starter.model, "dtype": "bfloat16"}}),
        _proxy(starter),
        _section("The tasks, in the order in which they arrive. metric: exact_match, choice, rouge_l, ... (docs/data.md).",
                 {"tasks": [_written(config, task) for config, task in found]}),
        _section("Room for the longest example, in tokens; a longer prompt is refused, never cut silently.",
                 {"data": {"max_length": _max_length(starter.model, [task for _, task in found])}}),
        _section("The share of the linear layers' weights that is trained; rows are fastest, elements the finest.",
                 {"mask": {"density": 0.05, "granularity": "row"}}),
        _section("A delta per task, in a bank. To compare it with one set of weights, random masks, full fine-tuning and LoRA: "
                 "[retrieved, consolidated, random, full, lora].",
                 {"continual": {"methods": ["retrieved"]}}),
        _section("AdamW on those entries.",
                 {"train": {"batch_size": BATCH_SIZE, "micro_batch_size": 4, "lr": 1e-3}}),
        _section("The probe: a short warm start of the proxy.", {"probe": {"batch_size": BATCH_SIZE, "lr": 1e-4}}),
    ]  # fmt: skip
    return "\n".join(blocks) + "\n"


def _section(comment: str, values: dict[str, object]) -> str:
    return f"\n# {comment}\n" + dump_yaml(values, width=110).rstrip()


def _ranks(ranks: int) -> str:
    if ranks == 1:
        return _section(
            "One process. Several GPUs: backend zero3 or fsdp2, and a launcher.", {"backend": "single"}
        )
    return _section(
        "The model is spread over these ranks. backend: zero3 (DeepSpeed) or fsdp2 (torch).",
        {"backend": "zero3", "launch": {"launcher": "deepspeed", "num_ranks": ranks}},
    )


def _proxy(starter: Starter) -> str:
    if starter.proxy is not None:
        return _section(
            "The small model that is probed for each task's core parameters.",
            {"proxy": {"path": starter.proxy, "dtype": "bfloat16"}},
        )
    layers = _num_layers(starter.model)
    keep = max(2, layers // PROXY_SHARE)
    path = str(Path(starter.run_dir) / "models" / "proxy")
    return _section(
        f"The small model that is probed: {keep} of the {layers} layers. A sibling checkpoint (--proxy) is better.",
        {"proxy": {"path": path, "dtype": "bfloat16", "prune": {"keep_layers": keep}}},
    )


def _num_layers(model: str) -> int:
    return int(load_config(model).get_text_config().num_hidden_layers)


def _max_length(model: str, tasks: Sequence[Task]) -> int:
    """Room for the longest example: the next multiple of 64 tokens."""
    tokenizer = load_tokenizer(model)
    pairs = [
        encode_pairs(part["prompt"][:], part["answer"][:], tokenizer)
        for task in tasks
        for part in (task.train, task.test)
    ]
    longest = max(len(pair.prompt) + len(pair.answer) for part in pairs for pair in part)
    return -(-longest // 64) * 64


def _task(path: str, columns: Mapping[str, str]) -> tuple[TaskConfig, Task]:
    """A task named after its file, with the columns that its data have."""
    name = _KIND.sub("", Path(path.removeprefix(SCHEME)).name)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:MAX_BYTES] or "task"
    # Of what stands for something else, no task may have the name.
    name = f"{name}_task" if name.casefold() in (BASE, AUTO) else name
    config = TaskConfig(name=name, path=path)
    there = parts_of(config).train.columns if columns else ()
    given: dict[str, Any] = {key: column for key, column in columns.items() if column in there}
    config = replace(config, **given)
    try:
        config = replace(config, **form_of(config).fields)
        task = load_task(config, seed=0)
    except ValueError as error:
        # There is no configuration yet whose keys could be set.
        said = str(error).replace(f"tasks.{name}.prompt_field and ", "--prompt_field and --")
        for key in ("prompt_field", "answer_field"):
            said = said.replace(f"tasks.{name}.{key}", f"--{key}")
        raise ValueError(said) from None
    answers = {answer.strip() for answer in task.train["answer"][:]}
    choice = 1 < len(answers) <= FEW_ANSWERS < len(task.train)
    return replace(config, metric="choice" if choice else "exact_match"), task


def _written(config: TaskConfig, task: Task) -> dict[str, object]:
    """The keys of a task that differ from their defaults."""
    steps = min(MOST_STEPS, max(FEWEST_STEPS, EPOCHS * len(task.train) // BATCH_SIZE))
    default = TaskConfig(name="default", path="default")
    keys = ("name", "path", "prompt_field", "answer_field", "messages_field", "metric")
    written = {key: getattr(config, key) for key in keys if getattr(config, key) != getattr(default, key)}
    return {**written, "num_train": len(task.train), "num_test": len(task.test), "steps": steps}
