"""`init` writes a configuration that runs, and a dry run says what it would do without a trace on the disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cli.program import make_config, write_config, write_tasks
from transformers import LlamaModel

from trace_dist.cli.main import main
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import RunConfig, TinyConfig
from trace_dist.config.continual import USUAL
from trace_dist.data import load_examples
from trace_dist.models.prune import depth_prune
from trace_dist.models.tiny import build_tiny
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.profiling.speed import UTILISATION, Machine
from trace_dist.report.memory_tables import mib
from trace_dist.stages.needs import setup_of
from trace_dist.stages.pipeline import stage_groups
from trace_dist.stages.preview import Preview, describe, preview
from trace_dist.stages.start import keep_config
from trace_dist.stages.starter import Starter, starter_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model and three tasks; one has other columns and few answers."""
    write_tasks(tmp_path)
    rows = [{"question": f"{i} is", "answer": ["odd", "even"][i % 2 == 0]} for i in range(80)]
    (tmp_path / "parity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        line for name in ("copy", "parity") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
    ]
    tokenizer = char_tokenizer({"all": texts}, texts)
    tokenizer.save_pretrained(tmp_path / "model")
    build_tiny(TinyConfig(32, 6, 2, 48), len(tokenizer), seed=0).save_pretrained(tmp_path / "model")
    return tmp_path


def read(text: str, folder: Path) -> RunConfig:
    path = folder / "mine.yaml"
    path.write_text(text)
    return run_config(parse(["run", "--config", str(path)])["run"])


def start(folder: Path, *names: str, proxy: str | None = None, ranks: int = 1) -> Starter:
    data = [str(folder / f"{name}.jsonl") for name in names]
    return Starter(str(folder / "model"), data, proxy, str(folder / "run"), ranks)


def test_the_file_is_a_configuration_with_what_the_data_say(folder: Path) -> None:
    text = starter_config(start(folder, "copy", "parity"))
    cfg = read(text, folder)
    copy, parity = cfg.tasks
    assert (copy.name, copy.metric, copy.prompt_field) == ("copy", "exact_match", "prompt")
    assert (parity.name, parity.metric, parity.prompt_field) == ("parity", "choice", "question")
    assert copy.num_train + copy.num_test == 60
    assert cfg.data.max_length == 64
    assert cfg.proxy is not None
    assert cfg.proxy.prune is not None
    assert cfg.proxy.prune.keep_layers == 2
    assert cfg.backend == "single"
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert len(comments) > len(cfg.tasks) + 5


def test_a_proxy_and_ranks_of_ones_own(folder: Path) -> None:
    cfg = read(starter_config(start(folder, "copy", proxy="small", ranks=4)), folder)
    assert cfg.proxy is not None
    assert (cfg.proxy.path, cfg.proxy.prune) == ("small", None)
    assert (cfg.backend, cfg.launch.num_ranks) == ("zero3", 4)


def test_data_in_other_forms_and_files(folder: Path) -> None:
    """What is written is what was found, and it reads the same data."""
    turns = [[("user", f"{i} is"), ("assistant", f"n{i}")] for i in range(80)]
    chats = [
        {"talk": "", "messages": [{"role": role, "content": said} for role, said in each]} for each in turns
    ]
    (folder / "chat.json").write_text(json.dumps(chats))
    alpaca = "".join(f'"{i} is","","n{i}"\n' for i in range(80))
    (folder / "steps.csv").write_text(f"instruction,input,output\n{alpaca}")
    made = starter_config(
        Starter(str(folder / "model"), [str(folder / "chat.json"), str(folder / "steps.csv")], None, "r", 1)
    )
    chat, steps = read(made, folder).tasks
    assert (chat.name, chat.messages_field, chat.prompt_field) == ("chat", "messages", None)
    assert (steps.name, steps.messages_field, steps.prompt_field) == ("steps", None, None)
    assert load_examples(chat, seed=0) == load_examples(steps, seed=0)


def test_data_of_the_package(folder: Path) -> None:
    """A task is called as its file, not as what stands before it."""
    made = starter_config(Starter(str(folder / "model"), ["example:vowels.jsonl"], None, "r", 1))
    (task,) = read(made, folder).tasks
    assert (task.name, task.path) == ("vowels", "example:vowels.jsonl")


def test_files_whose_names_no_task_may_have(folder: Path) -> None:
    names = ["base", "Auto", "q" * 200]
    for name in names:
        shutil.copy(folder / "copy.jsonl", folder / f"{name}.jsonl")
    tasks = read(starter_config(start(folder, *names)), folder).tasks
    assert [task.name for task in tasks] == ["base_task", "Auto_task", "q" * 150]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["nothing"], "no such file"),
        (["copy", "copy"], "rename one"),
        (["strange"], "columns that were tried"),
        (["empty"], r"empty.jsonl: holds no examples; write some$"),
        (
            ["one"],
            "all 30 examples have the same prompt, .* name another column by --prompt_field, or give the source a test",
        ),
        (["few"], "4 examples of 2 prompts are too few to split off a test set by hash"),
    ],
)
def test_what_cannot_be_read_is_refused(names: list[str], words: str, folder: Path) -> None:
    (folder / "strange.jsonl").write_text('{"left": "a", "right": "b"}\n')
    (folder / "empty.jsonl").write_text("\n")
    (folder / "one.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 30)
    (folder / "few.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "b"}\n' * 2)
    with pytest.raises(ValueError, match=words):
        starter_config(start(folder, *names))


def test_columns_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error told to set keys of a configuration that `init` would not write."""
    monkeypatch.chdir(folder)
    rows = [json.loads(line) for line in Path("copy.jsonl").read_text().splitlines()]
    renamed = [json.dumps({"Frage": row["prompt"], "Ziel": row["answer"]}) for row in rows]
    Path("own.jsonl").write_text("\n".join(renamed))
    words = ["init", "--model", "model", "--data", "copy.jsonl", "own.jsonl", "--out", "new.yaml"]
    assert main(words) == 2
    assert "set --prompt_field and --answer_field to two of them" in capsys.readouterr().err
    assert main([*words, "--prompt_field", "Frage", "--answer_field", "Zeil"]) == 2
    assert "set --answer_field to one of them" in capsys.readouterr().err
    assert main([*words, "--prompt_field", "Frage", "--answer_field", "Ziel"]) == 0
    copy, own = read(Path("new.yaml").read_text(), folder).tasks
    assert (copy.prompt_field, copy.answer_field) == ("prompt", "answer")
    assert (own.prompt_field, own.answer_field) == ("Frage", "Ziel")


def test_a_column_that_no_file_has(folder: Path) -> None:
    given = replace(start(folder, "copy"), columns={"prompt_field": "Frage"})
    with pytest.raises(ValueError, match="prompt_field='Frage': no file of data has this column"):
        starter_config(given)


def test_the_command_writes_it_once_and_shows_the_dry_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["init", "--model", "model", "--data", "copy.jsonl", "twist.jsonl", "--out", "new.yaml"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for word in ("learn copy", "learn twist", "trained:", "memory", "time: about", "--config new.yaml"):
        assert word in shown
    written = Path("new.yaml").read_text()
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert Path("new.yaml").read_text() == written
    assert not Path("runs").exists()


def test_an_answer_that_is_always_the_same_is_no_choice(folder: Path) -> None:
    rows = [{"prompt": f"{i} is", "answer": "odd" + " " * (i % 2)} for i in range(80)]
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = read(starter_config(start(folder, "odd")), folder)
    assert cfg.tasks[0].metric == "exact_match"
    preview(cfg)


def test_a_configuration_that_cannot_run_is_said_to_be_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command refuses to replace it."""
    monkeypatch.chdir(folder)
    Path("COPY.jsonl").write_text(Path("twist.jsonl").read_text())
    words = ["init", "--model", "model", "--data", "copy.jsonl", "COPY.jsonl", "--out", "new.yaml"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "names must be unique" in shown.err
    assert "written: new.yaml; mend it, or delete it" in shown.out


def test_a_dry_run_leaves_no_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the models are not made yet: their size is then said to be unknown."""
    path = write_config(folder, make_config(folder))
    for command in (["run"], ["learn", "--bank", str(folder / "bank")]):
        assert main([*command, "--config", str(path), "--dry_run", "true"]) == 0
        assert "made by the first run" in capsys.readouterr().out
    assert not (folder / "run").exists()
    assert not (folder / "bank").exists()


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("run", ["--train.scheduler", "cosin"], "train.scheduler='cosin'"),
        ("run", ["--data.max_length", "4", "--run_dir", "new"], "tasks.copy: "),
        ("run", ["--mask.density", "1e-9"], "mask.density=1e-09"),
        ("run", ["--seed", "7"], "made with other values of seed"),
        ("learn", ["--continual.methods", "[retrieved]"], "holds no copy"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    command: str, options: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts, data, masks, and what the run folder holds already; nothing is written."""
    path = folder / "mine.yaml"
    cfg = read(starter_config(start(folder, "copy")), folder)
    keep_config(cfg, whole_run=True)
    result = cfg.folder.method("retrieved")
    result.parent.mkdir()
    result.write_text("{}")
    before = sorted(folder.rglob("*"))
    assert main([command, "--config", str(path), *options, "--dry_run", "true"]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "trained:" not in said.out
    assert sorted(folder.rglob("*")) == before


def test_the_preview_counts_what_a_mask_trains(folder: Path) -> None:
    """Steps, entries and operations, against the configuration and the model itself."""
    cfg = read(starter_config(start(folder, "copy", "twist")), folder)
    found = preview(cfg)
    assert found.num_parameters == build_tiny(TinyConfig(32, 6, 2, 48), 1, 0).num_parameters() + 32 * (
        found_vocabulary(folder) - 1
    )
    linear = 6 * (4 * 32 * 32 + 3 * 32 * 48)
    assert found.num_entries == pytest.approx(0.05 * linear, rel=0.1)
    steps = {piece.name: piece.steps for piece in found.work}
    assert steps["retrieved: learn copy"] == cfg.tasks[0].steps
    assert steps["probe twist"] == cfg.probe.steps
    flops = {piece.name: piece.flops for piece in found.work}
    assert flops["retrieved: learn copy"] > flops["retrieved: score"] > 0
    assert all(flops[f"project {name}"] > 0 for name in ("copy", "twist"))


def test_the_preview_counts_the_bytes_of_a_delta(folder: Path) -> None:
    """A value of each entry, and next to nothing for rows; a byte or so more for single entries."""
    cfg = read(starter_config(start(folder, "copy")), folder)
    value = 2 if cfg.target.dtype == "bfloat16" else 4
    sizes = []
    for granularity in ("row", "element"):
        found = preview(replace(cfg, mask=replace(cfg.mask, granularity=granularity)))
        assert found.num_entries is not None
        assert found.delta_bytes is not None
        sizes.append(found.delta_bytes / found.num_entries - value)
    rows, elements = sizes
    assert 0 < rows < 0.1
    assert 0.5 < elements < 1.5


def test_the_preview_counts_the_prompts_that_a_bank_answers(folder: Path) -> None:
    cfg = read(starter_config(start(folder, "copy", "twist")), folder)

    def asked(**options: Any) -> int:
        methods = replace(
            cfg.continual, methods=["retrieved", "consolidated"], options={"consolidated": options}
        )
        found = preview(replace(cfg, tasks=cfg.tasks[:1], general=cfg.tasks[1:], continual=methods))
        (work,) = (each for each in found.work if each.name == "consolidated: answers to learn from")
        return int(work.detail.split()[0])

    trained = [task.num_train for task in cfg.tasks]
    # those of the task, and the general ones, which the base answers
    assert asked() == sum(trained)
    assert asked(general=0.0) == trained[0]
    assert asked(prompts=7) == 14


def every_group_has_a_row(cfg: RunConfig, found: Preview) -> None:
    named = {piece.stage for piece in found.work}
    assert all(stage.name in named for group in stage_groups(cfg) for stage in group)


def test_init_learns_by_one_method_and_names_the_others(folder: Path) -> None:
    text = starter_config(start(folder, "copy"))
    cfg = read(text, folder)
    assert cfg.continual.methods == ["retrieved"]
    assert all(name in text for name in USUAL)
    found = preview(cfg)
    every_group_has_a_row(cfg, found)
    # the probe, and learning with projection before it
    assert found.num_starts == 2


def test_the_proxy_that_will_be_cut_out_has_a_size(folder: Path) -> None:
    cfg = read(starter_config(start(folder, "copy")), folder)
    found = preview(cfg)
    assert found.unknown == []
    (probe,) = (piece for piece in found.work if piece.name == "probe copy")
    assert cfg.proxy is not None
    depth_prune(Path(cfg.target.path), 2, Path(cfg.proxy.path))
    (cut,) = (piece for piece in preview(cfg).work if piece.name == "probe copy")
    assert probe.flops == cut.flops
    assert probe.flops


def test_every_stage_and_method_of_a_run_is_in_the_preview(folder: Path) -> None:
    text = starter_config(start(folder, "copy", "twist", ranks=2))
    cfg = read(text, folder)
    methods = [*USUAL, "joint", "ties", "trace", "lora_retrieved", "separate", "ewc"]
    cfg = replace(cfg, continual=replace(cfg.continual, methods=methods), train=replace(cfg.train, lr="auto"))
    found = preview(cfg)
    every_group_has_a_row(cfg, found)
    steps = {piece.name: piece.steps for piece in found.work}
    flops = {piece.name: piece.flops for piece in found.work}
    own = [task.steps for task in cfg.tasks]
    assert None not in own
    for method in methods:
        trained = steps.get(f"{method}: learn twist")
        both = method in ("joint", "consolidated")
        assert trained == (None if method == "ties" else sum(own) if both else own[1])  # type: ignore[arg-type]
        assert f"{method}: score" in steps
        race = f"{method}: race on copy and twist"
        assert (race in steps) == (method != "ties")
        assert steps.get(race, 240) == 3 * 2 * 40
    one = replace(cfg, race=replace(cfg.race, tasks=1))
    raced = {piece.name: piece for piece in preview(one).work}
    assert raced["full: race on copy"].steps == 120
    assert raced["full: race on copy"].flops < flops["full: race on copy and twist"]
    assert flops["full: learn copy"] > flops["random: learn copy"] > 0
    assert steps["measure memory"] > 0
    # full, lora, joint, lora_retrieved, separate and ewc are dense training in one process; the others are on both ranks
    assert found.num_parameters is not None
    needs = {need.what: need for need in found.memory}
    on_ranks = {name for name, need in needs.items() if need.num_ranks == 2}
    assert on_ranks == {"retrieved", "consolidated", "random", "trace", "measuring full training"}
    measured = sum(needs["measuring full training"].estimate.states.values())
    # 16 bytes per parameter over two ranks, or 18: the estimate counts every gradient in fp32
    assert 8 * found.num_parameters <= measured <= 9.1 * found.num_parameters
    full, lora, ewc = (needs[name].estimate for name in ("full", "lora", "ewc"))
    # where a task began, and the Fisher information of those before it, both in fp32
    assert ewc.peak - full.peak == pytest.approx(8 * found.num_parameters, rel=0.01)
    assert ewc.peak == sum(ewc.peak_parts.values())
    # from a copy of weights and moments in the same memory checkpoints are written, with the best weights where they are kept
    copies = sum(full.states.get(name, 0) for name in ("checkpoint", "best"))
    assert sum(full.states.values()) - copies == pytest.approx(16 * found.num_parameters, rel=0.01)
    kept = cfg.train.eval_every > 0 and cfg.train.keep == "best"
    assert copies == pytest.approx((20 if kept else 12) * found.num_parameters, rel=0.01)
    for train in (replace(cfg.train, checkpoint_every=0), replace(cfg.train, checkpoint_async=False)):
        assert not setup_of(replace(cfg, train=train), 8).checkpoint_async
    looking = replace(cfg.train, eval_every=5, keep="best")
    assert setup_of(replace(cfg, train=looking), 8).keep_best
    assert not setup_of(replace(cfg, train=replace(looking, keep="last")), 8).keep_best
    assert 4 * found.num_parameters < sum(lora.states.values()) < sum(full.states.values())
    _, lines = describe(cfg, found)
    (alone,) = (line for line in lines if line.startswith("memory in one process"))
    assert f"{mib(ewc.peak)} at the peak (ewc)" in alone
    assert any(line.startswith("memory on each of 2 ranks") for line in lines)


def test_the_preview_counts_the_passes_of_a_real_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is told from passes and what one of them takes; here the passes of a run, against those that it makes."""
    cfg = read(starter_config(start(folder, "copy")), folder)
    cfg = replace(
        cfg,
        tasks=[replace(cfg.tasks[0], steps=3)],
        train=replace(cfg.train, warmup_steps=0),
        probe=replace(cfg.probe, steps=2, fisher_batches=1),
        projection=replace(cfg.projection, options={"steps": 2}),
    )
    path = write_config(folder, json.loads(json.dumps(asdict(cfg))))
    found, made = preview(cfg), 0
    forward = LlamaModel.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    for command in ("probe", "continual"):
        made = 0
        assert main([command, "--config", str(path)]) == 0
        told = [piece for piece in found.work if (piece.stage == "probe") == (command == "probe")]
        assert made > 0
        # A training pass counts three times, since it goes back too, and a step once more.
        passes = sum(piece.passes for piece in told)
        assert made <= passes <= 5 * made, (command, made, passes)
    assert found.seconds > 0


def test_a_small_model_is_not_as_fast_as_its_products(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of these rates its time is that of operators which do next to nothing."""
    machine = Machine(matmul=1e11, launch=1e-5)
    monkeypatch.setattr(Machine, "measured", lambda *_: machine)
    found = preview(read(starter_config(start(folder, "copy")), folder))
    products = sum(piece.flops or 0.0 for piece in found.work) / (UTILISATION * machine.matmul)
    passes = sum(piece.passes for piece in found.work)
    # A pass of its smaller model, of two layers, launches more than a hundred operators.
    assert found.seconds > passes * 100 * machine.launch + products
    assert found.seconds > 10 * products


def test_what_is_not_known_is_said_and_not_counted(folder: Path) -> None:
    """A tiny proxy has no size before its tokenizer is made."""
    cfg = read(starter_config(start(folder, "copy")), folder)
    assert cfg.proxy is not None
    tiny = replace(cfg.proxy, prune=None, tiny=TinyConfig(16, 2, 2, 24))
    cfg = replace(cfg, proxy=tiny, general=cfg.tasks and [replace(cfg.tasks[0], name="other")])
    found = preview(cfg)
    every_group_has_a_row(cfg, found)
    assert found.unknown == ["pretrain the proxy", "probe copy"]
    _, lines = describe(cfg, found, start_seconds=7.0)
    assert "not in it, since a model is not made yet: pretrain the proxy, probe copy" in lines
    assert any(f"{2 * 7} s to start 2 processes" in line for line in lines)


def test_finished_stages_are_there(folder: Path) -> None:
    cfg = read(starter_config(start(folder, "copy")), folder)
    (probe,) = (stage for group in stage_groups(cfg) for stage in group if stage.name == "probe")
    for path in probe.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = preview(cfg)
    assert [piece.detail for piece in found.work if piece.stage == "probe"] == ["is there"]
    assert found.num_starts == 1


def found_vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "model" / "config.json").read_text())["vocab_size"])
