"""What makes a run impossible is said before anything is made or trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from trace_dist.config import (
    BankConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TinyConfig,
)
from trace_dist.models.loading import load_tokenizer
from trace_dist.models.tiny import build_tiny
from trace_dist.stages.base import prepare_base
from trace_dist.train.workbench import Tasks, Workbench
from trace_dist.utils import dist

Write = Callable[..., TaskConfig]
TINY = TinyConfig(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, steps=1, batch_size=4)


def rows(num: int, start: int = 0, tail: str = "", answer: str | None = None) -> list[dict[str, str]]:
    return [
        {"prompt": f"say {i:03d}{tail if i % 2 else ''}", "answer": str(i % 7) if answer is None else answer}
        for i in range(start, start + num)
    ]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a task's files and gives its configuration."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write_task(name: str, train: Any, test: Any, **options: Any) -> TaskConfig:
        for ending, examples in (("", train), (".test", test)):
            path = tmp_path / f"{name}{ending}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in examples))
        return TaskConfig(name=name, path=str(tmp_path / f"{name}.jsonl"), **options)

    return write_task


def run(tmp_path: Path, *tasks: TaskConfig, **options: Any) -> RunConfig:
    target = ModelConfig(path=str(tmp_path / "target"), tiny=TINY)
    return RunConfig(**{"run_dir": str(tmp_path / "run"), "target": target, "tasks": list(tasks), **options})


def refused(cfg: RunConfig, message: str) -> None:
    """Refused when read, and before the base is made."""
    for call in (lambda: Tasks.load(cfg), lambda: prepare_base(cfg, "target")):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    assert not Path(cfg.target.path).exists()


def test_a_run_that_is_possible_is_not_refused(tmp_path: Path, write: Write) -> None:
    tasks = [write("a", rows(8), rows(2, 50)), write("b", rows(8), [*rows(1, 50), *rows(1, 60, answer="")])]
    general = [write(name, rows(4), rows(2, 50)) for name in ("g", "h")]
    loaded = Tasks.load(run(tmp_path, *tasks, general=general))
    assert [task.name for task in (*loaded.tasks, *loaded.general)] == ["a", "b", "g", "h"]


def test_counts(tmp_path: Path, write: Write) -> None:
    good, few = write("a", rows(20), rows(2, 50)), write("few", rows(7), rows(2, 50))
    general = [write("g", rows(20), rows(2, 50))]
    refused(run(tmp_path, good, few, general=general), r"tasks\.few: 7 training prompts.*at least 8")
    refused(run(tmp_path, good, general=[few]), "general: 7 training prompts")
    refused(
        run(tmp_path, good, general=general, bank=BankConfig(num_prompts=7)), r"7 training.*num_prompts=7"
    )
    capped = write("capped", rows(20), rows(2, 50), num_train=7)
    refused(run(tmp_path, capped, general=general), r"tasks\.capped: 7 training prompts.*num_train")


def test_layer(tmp_path: Path, write: Write) -> None:
    general = [write("g", rows(20), rows(2, 50))]
    task = write("a", rows(20), rows(2, 50))
    refused(
        run(tmp_path, task, general=general, bank=BankConfig(layer=2)),
        r"bank\.layer=2: must lie in \[-2, 1\]",
    )
    Tasks.load(run(tmp_path, task, general=general, bank=BankConfig(layer=-2)))


def test_texts(tmp_path: Path, write: Write) -> None:
    task = write("a", rows(20), rows(2, 50))
    text = write("text", rows(20), [*rows(2, 50), *rows(1, 60, answer="")], metric="bits_per_byte")
    refused(run(tmp_path, task, general=[text]), r"tasks\.text: the answer of test example \d is empty")


def test_a_metric_that_cannot_be_computed(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, plain = write("a", rows(20), rows(2, 50)), [write("g", rows(20), rows(2, 50))]
    task = write("own", rows(20), rows(2, 50), metric="no_such_package.metric")
    refused(
        run(tmp_path, good, task, general=plain),
        r"tasks\.own\.metric='no_such_package\.metric': cannot be imported",
    )
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    general = [replace(plain[0], metric="chrf")]
    refused(run(tmp_path, good, general=general), r"tasks\.g\.metric='chrf': .*trace-dist\[metrics\]")


def test_conversations_are_checked_like_texts(tmp_path: Path, write: Write) -> None:
    """Tokenizer of a tiny base, lengths and counts; the turns before a question count."""

    def talk(num: int, start: int, said: str) -> list[dict[str, Any]]:
        turns = [{"role": "user", "content": "say it"}, {"role": "assistant", "content": said}]
        end = {"role": "assistant", "content": "1"}
        return [
            {"messages": [*turns, {"role": "user", "content": f"go on {i}"}, end]}
            for i in range(start, start + num)
        ]

    general = [write("g", rows(20), rows(2, 50))]
    Tasks.load(run(tmp_path, write("talk", talk(20, 0, "well"), talk(2, 50, "\u00e9")), general=general))
    long = write("long", talk(20, 0, "well"), talk(2, 50, "x" * 300))
    refused(run(tmp_path, long, general=general), r"tasks\.long: a test example needs 3\d\d tokens")


def test_lengths_of_every_example_and_the_generation_cap(tmp_path: Path, write: Write) -> None:
    good = write("a", rows(20), rows(2, 50))
    general = [write("g", rows(20), rows(2, 50))]
    long = " abc" * 100
    for task in (
        write("long", rows(20), rows(2, 50, tail=long)),
        write("long", rows(20), rows(2, 50, answer="1" * 300)),
        write("long", rows(20), rows(2, 50, answer="1" * 300), metric="choice"),
    ):
        refused(
            run(tmp_path, good, task, general=general),
            r"tasks\.long: a test example needs \d+ tokens.*256 pos",
        )
    task = write("long", rows(20, tail=long), rows(2, 50))
    refused(run(tmp_path, good, task, general=general), r"tasks\.long: a training example needs 4\d\d tokens")
    refused(run(tmp_path, good, general=[task]), r"tasks\.long: a training example needs")
    refused(
        run(tmp_path, good, task, general=general, data=DataConfig(max_length=99)),
        r"tasks\.long: example.*=99",
    )
    refused(
        run(tmp_path, good, general=general, eval=EvalConfig(max_new_tokens=255)), r"tasks\.a: a test example"
    )
    Tasks.load(
        run(tmp_path, good, task, general=general, data=DataConfig(max_length=99, truncate_prompt=True))
    )


def test_the_target_is_checked_before_the_proxy_is_probed(tmp_path: Path, write: Write) -> None:
    tasks = [write("a", rows(20), rows(2, 50, tail="x" * 80))]
    general = [write("g", rows(20), rows(2, 50))]
    cfg = run(
        tmp_path, *tasks, general=general,
        target=ModelConfig(path=str(tmp_path / "target")), proxy=ModelConfig(path=str(tmp_path / "proxy")),
    )  # fmt: skip
    tokenizer = Tasks.load(run(tmp_path, *tasks, general=general)).characters()
    for role, positions in (("target", 256), ("proxy", 40)):
        model = build_tiny(TINY, len(tokenizer), seed=0)
        model.config.max_position_embeddings = positions
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    Workbench.load(cfg, cfg.probed.path)  # the proxy never reads test examples
    model.save_pretrained(tmp_path / "target")
    with pytest.raises(ValueError, match=r"tasks\.a: a test example needs .* the target has 40 positions"):
        Workbench.load(cfg, cfg.probed.path)


def test_ids_beyond_the_embedding(tmp_path: Path, write: Write) -> None:
    """A tokenizer with more tokens than the model embeds is refused where an example holds one of them."""
    general = [write("g", rows(20), rows(2, 50))]
    good, odd = write("a", rows(20), rows(2, 50)), write("odd", rows(20), rows(2, 50, answer="<new>"))
    trained = write("trained", rows(20, answer="<new>"), rows(2, 50))
    tokenizer = Tasks.load(run(tmp_path, good, general=general)).characters()
    embedded = len(tokenizer)
    build_tiny(TINY, embedded, seed=0).save_pretrained(tmp_path / "target")
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    tokenizer.save_pretrained(tmp_path / "target")
    Tasks.load(run(tmp_path, good, general=general))
    for task, part in ((odd, "test"), (trained, "training")):
        message = (
            rf"tasks\.{task.name}: target\.path: a {part} example holds '<new>', token {embedded} of its tokenizer, "
            rf"but the model embeds {embedded} .*resize_token_embeddings\({embedded + 1}\)"
        )
        with pytest.raises(ValueError, match=message):
            Tasks.load(run(tmp_path, good, task, general=general))
    tokenizer = load_tokenizer(tmp_path / "target")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < embedded  # <fill> is not embedded either
    build_tiny(TINY, embedded + 2, seed=0).save_pretrained(tmp_path / "target")
    Tasks.load(run(tmp_path, good, odd, trained, general=general))
    assert load_tokenizer(tmp_path / "target").pad_token == "<fill>"


def test_one_rank_of_a_host_tokenises_and_the_others_read_its_cache(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 writes nothing before rank 0 of its host is done, and nothing afterwards."""
    cfg = run(tmp_path, write("a", rows(20), rows(2, 50)), general=[write("g", rows(20), rows(2, 50))])
    tokenizer = Tasks.load(cfg).characters()
    model = build_tiny(TINY, len(tokenizer), seed=0)
    for made in (model, tokenizer):
        made.save_pretrained(tmp_path / "target")
    shutil.rmtree(tmp_path / "cache")
    met: list[set[Path]] = []

    def meet(value: object) -> list[object]:
        """Rank 0 encodes before the ranks have met for the second time."""
        if len(met) == 1:
            assert encoded() == set()
            with monkeypatch.context() as alone:
                alone.setattr(dist, "world_size", lambda: 1)
                Workbench.load(cfg, cfg.target.path)
        met.append(encoded())
        return [value, value]

    def encoded() -> set[Path]:
        return set((tmp_path / "cache").rglob("*.arrow"))

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "gather_objects", meet)
    assert len(Workbench.load(cfg, cfg.target.path).tasks[0].encoded) == 20
    assert met[1] == met[2] != set()
