"""Every reader of the package: how a whole file is made, and what reads it, as far as a command uses it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from bank.samples import drawn, small_delta, write_old_bank
from cli.program import make_config
from engine.cases import CASES
from fuzz import jobs, models, people, requests
from fuzz.reader import Arguments, Reader, manifest_signed, record_signed, silently, tensors_signed
from report.samples import make_results
from rich.console import Console
from torch import nn

from trace_dist import Delta, DeltaBank, Mask, MaskedAdamW, shard
from trace_dist.bank.bank import BASE
from trace_dist.bank.prompts import Prompts, load_prompts
from trace_dist.bank.recipe import GROUPS, Part, Recipe, mixed
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import Signature
from trace_dist.bank.sketch import Sketch, cosines, sketch_update
from trace_dist.checkpoint import load_checkpoint, load_dense, save_checkpoint, save_dense
from trace_dist.cli import parser
from trace_dist.cli.bank_commands import bank_command
from trace_dist.cli.mask_commands import mask_command
from trace_dist.cli.parser import parse, run_config
from trace_dist.config import ProbeConfig, TaskConfig
from trace_dist.continual.density import DensityRace, read_density
from trace_dist.continual.judge import Row
from trace_dist.continual.progress import Progress, keep_trained, kept_trained
from trace_dist.continual.race import Race
from trace_dist.continual.result import read_result
from trace_dist.data.encoding import Pair
from trace_dist.data.sources import load_examples
from trace_dist.masks import UnitLayout
from trace_dist.masks.storage import load_saliency, save_saliency
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.origin import Origin
from trace_dist.probe.learning import Learning
from trace_dist.probe.task import Probed, Tensors
from trace_dist.report import heat, load_results, retrieval, summary_table
from trace_dist.report.markdown import markdown_table
from trace_dist.report.narrative import narrate
from trace_dist.report.results import parse_results
from trace_dist.report.tables import headline
from trace_dist.run_folder import BankFolder
from trace_dist.stages.stage import read_timings
from trace_dist.train.loop import TrainResult
from trace_dist.utils.files import write_json
from trace_dist.utils.sealed import write_record

LAYOUTS = {
    "whole": UnitLayout((6, 8), 4),
    "ragged": UnitLayout((3, 5), 2),
    "columns": UnitLayout((6, 8), 6, 8),
}
SCORES = {name: torch.rand(layout.num_units) for name, layout in LAYOUTS.items()}


# ---- configuration, data


def make_yaml(folder: Path) -> Path:
    path = folder / "run.yaml"
    whole = make_config(folder) | {"race": {"grid": [1e-3, 3e-3]}, "mask": {"isolation_options": {}}}
    whole["continual"] = {"methods": ["retrieved", "merged"], "options": {"merged": {"lr": 0.1}}}
    path.write_text(yaml.safe_dump(whole))
    return path


@cache
def run_parser() -> parser.Parser:
    """The same for every file, and slow to build."""
    return parser.build_parser(["run"])


def read_yaml(path: Path) -> None:
    built = run_parser()
    with redirect_stderr(io.StringIO()) as said, patch.object(parser, "build_parser", lambda _: built):
        try:
            values = parse(["run", "--config", str(path)])
        except SystemExit as end:
            # what the parser says of a wrong command line, in one line
            if end.code == 2 and said.getvalue().count("\n") == 1 and said.getvalue().startswith("error: "):
                raise ValueError(said.getvalue()) from None
            raise
    run_config(values["run"])


ROWS = [{"prompt": f"say {i}", "answer": str(i), "more": [i]} for i in range(40)]


def make_jsonl(folder: Path) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read_jsonl(path: Path) -> None:
    load_examples(TaskConfig("t", str(path), num_train=20, num_test=5), 0)


def make_list(folder: Path) -> Path:
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(ROWS))
    return folder / "train.json"


def read_list(path: Path) -> None:
    read_jsonl(path.parent)


# ---- masks and what the probe leaves


def make_mask(folder: Path) -> Path:
    units = {"whole": torch.tensor([0, 11]), "ragged": torch.tensor([2, 3]), "columns": torch.tensor([1, 7])}
    int32 = {name: indices.to(torch.int32) for name, indices in units.items()}
    Mask(int32, LAYOUTS, "block", {"task": "t", "model": "f"}).save(folder / "mask.safetensors")
    return folder / "mask.safetensors"


def read_mask(path: Path) -> None:
    silently(lambda: mask_command(Arguments(action="show", show=Arguments(file=str(path), picture=None))))
    mask = Mask.load(path)
    assert mask | mask == mask


def make_saliency(folder: Path) -> Path:
    save_saliency(folder / "s.safetensors", SCORES, LAYOUTS, {"task": "t"})
    return folder / "s.safetensors"


def make_trace(folder: Path) -> Path:
    sketch = sketch_update({"w": torch.ones(5)}, 0, "m")
    whole = Tensors(dict.fromkeys(SCORES, 0.5), {name: list(units.shape) for name, units in LAYOUTS.items()})
    Probed(SCORES, sketch, [(1, 0.5)], whole, Learning(2.0, 1.0, 1.5, 9)).save(
        folder / "t.safetensors", folder / "sketch.safetensors", ProbeConfig()
    )
    return folder / "t.safetensors"


def read_trace(path: Path) -> None:
    Probed.load(path, path.with_name("sketch.safetensors"), "m", ProbeConfig())
    Tensors.load(path)


# ---- banks


def make_bank(folder: Path) -> DeltaBank:
    bank = DeltaBank.create(folder / "bank", "aaaa", layer=1)
    bank.add(drawn(BASE, 0), None)
    sketch = sketch_update({"w": torch.ones(5)}, 0)
    prompts = {"one": Prompts([Pair([5, 6], []), Pair([7], [])], 4)}
    bank.add(drawn("one", 1), small_delta("one", 1), sketch, {"lr": 0.1}, prompts)
    return bank


def member(file: str) -> Callable[[Path], Path]:
    return lambda folder: make_bank(folder).files.task("one") / file


def read_delta(path: Path) -> None:
    mask = Delta.load(path).mask
    assert Delta.load_mask(path) == mask


def read_signature(path: Path) -> None:
    found = Retriever([Signature.load(path), drawn("two", 2)])
    found.predict(torch.zeros(1, 8))


def read_sketch(path: Path) -> None:
    found = Sketch.load(path)
    cosines(found, [found])


def make_recipe(folder: Path) -> Path:
    scalars = dict.fromkeys(GROUPS, 0.5)
    Recipe((Part("ab" * 32, scalars), Part("cd" * 32, scalars, recipe="ef" * 32))).save(
        folder / "recipe.json"
    )
    return folder / "recipe.json"


def read_recipe(path: Path) -> None:
    for part in Recipe.load(path).parts:
        assert all(type(checksum) in (str, type(None)) for checksum in part.key)
        mixed(torch.zeros(3), [(torch.arange(3), torch.ones(3), part.scalars[group]) for group in GROUPS])


def read_bank(path: Path) -> None:
    bank = DeltaBank(path.parent)
    silently(lambda: bank_command(Arguments(action="show", show=Arguments(folder=str(path.parent)))))
    for name in bank.tasks:
        bank.signature(name), bank.sketch(name), bank.delta(name), bank.prompts(name)


def make_old_bank(folder: Path) -> Path:
    write_old_bank(folder / "old", [(drawn(BASE, 0), None), (drawn("one", 1), small_delta("one", 1))])
    return folder / "old" / "signatures.safetensors"


# ---- checkpoints


@cache
def masked() -> MaskedAdamW:
    model = shard(CASES["element"].model(), "single")
    return MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0).with_meta(model="aaaa"))


@cache
def dense() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def make_checkpoint(file: str, kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        # an earlier reader may have loaded something into them
        masked.cache_clear(), dense.cache_clear()
        if kind == "masked":
            return save_checkpoint(folder, 3, masked(), {"epoch": 3}) / file
        module, optimizer = dense()
        return save_dense(folder, 3, module.named_parameters(), optimizer, {"epoch": 3}) / file

    return make


def read_manifest(path: Path) -> None:
    if path.name == "manifest.json" and b'"dense"' not in path.read_bytes():
        load_checkpoint(path.parent, masked())
    else:
        load_dense(path.parent, dense()[0].named_parameters(), dense()[1])


def read_rank_file(load: Callable[[Path], object]) -> Callable[[Path], object]:
    """With a manifest that has the checksum of the file as it is, so that what is behind it is reached."""

    def read(path: Path) -> object:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (path.parent / "manifest.json").write_text(json.dumps(manifest_signed(manifest)))
        return load(path.parent)

    return read


# ---- progress, results


def make_progress(folder: Path) -> Path:
    progress = Progress(folder / "p", {"model": "m", "options": {"replay": 0.1}})
    progress.begin(Row([25.0, 50.0], [75.0], [1.5]))
    progress.finish(
        "a", Row([1.0, 2.0], [3.0], [4.0]), 1e-3, {"n": 1}, lambda at: write_json(at / "x.json", [1])
    )
    return folder / "p" / "progress.json"


def read_progress(path: Path) -> None:
    progress = Progress(path.parent, {"model": "m", "options": {"replay": 0.1}})
    if progress.record.tasks:
        assert progress.state.is_dir()
    progress.trained()


def make_trained(folder: Path) -> Path:
    keep_trained(folder, "a", TrainResult([(1, 0.5)], [1.0], [0.25], 0.5))
    return folder / "trained" / "a.json"


def make_result(folder: Path) -> Path:
    result = make_results(["a", "b"])["modes"]["retrieved"]
    write_json(folder / "retrieved.json", result | {"general_names": ["sum"], "measured": {"date": "d"}})
    return folder / "retrieved.json"


def read_page(path: Path) -> None:
    """All of the page and the tables but the curves."""
    results = load_results(path)
    Console(file=io.StringIO(), width=100).print(summary_table(results))
    markdown_table(results)
    view = parse_results(results)
    (
        headline(view),
        narrate(view),
        heat.specificity_heat(view),
        heat.confusion_heat(view),
        heat.overlap_heats(view),
        heat.isolation(view),
        retrieval.facts(view),
        retrieval.margins(view),
        retrieval.typicality(view),
        retrieval.reject_rate(view),
        retrieval.examples(view),
    )
    [heat.accuracy_heat(view, method) for method in view.methods]


def make_page(folder: Path) -> Path:
    write_json(folder / "results.json", make_results(["a", "b"]))
    return folder / "results.json"


def make_densities(folder: Path) -> Path:
    race = DensityRace({0.01: Race({1e-3: 0.5, 3e-3: 0.4}), 0.1: Race({1e-3: 0.3})}, 0.05)
    write_record(folder / "density.json", {"about": {"model": "m"}, **race.to_json()})
    return folder / "density.json"


def read_densities(path: Path) -> None:
    found = read_density(path, {"model": "m"})
    assert found is None or (found.lr > 0 and 0 < found.density <= 1)


def make_origin(folder: Path) -> Path:
    heads = {"heads": [[0, 1], [0, 1]], "kv_heads": [[0], [1]], "head_rows": {"q": 2, "k": 2, "v": 2}}
    Origin("m", "model.layers", [0, 2], [0, 3], intermediate=[[1], [2]], **heads).save(folder)
    return folder / "pruned.json"


def read_origin(path: Path) -> None:
    found = Origin.load(path.parent)
    if found is not None:
        found.places("model.layers.1.self_attn.q_proj.weight", (4, 2))


def make_timings(folder: Path) -> Path:
    write_json(folder / "stages.json", {"stages": {"probe": 3.0}, "wall_seconds": 4.0})
    return folder / "stages.json"


# ---- models


def make_model(pattern: str) -> Callable[[Path], Path]:
    """A model of one layer in several files; the first one of this pattern is damaged."""

    def make(folder: Path) -> Path:
        model = replace(CASES["element"], num_layers=1).model()
        model.save_pretrained(folder / "model", max_shard_size="20KB")
        return sorted((folder / "model").glob(pattern))[0]

    return make


def read_model(path: Path) -> None:
    fingerprint(path.parent)


RANK = "rank-00000.safetensors"
READERS = (
    Reader("configuration", "yaml", make_yaml, read_yaml),
    Reader("data, JSON lines", "lines", make_jsonl, read_jsonl),
    Reader("data, JSON list", "json", make_list, read_list),
    Reader("mask", "tensors", make_mask, read_mask, tensors_signed),
    Reader("saliency map", "tensors", make_saliency, load_saliency, tensors_signed),
    Reader("trace of a probe", "tensors", make_trace, read_trace, tensors_signed),
    Reader("delta", "tensors", member("delta.safetensors"), read_delta, tensors_signed),
    Reader("signature", "tensors", member("signature.safetensors"), read_signature, tensors_signed),
    Reader("sketch", "tensors", member("sketch.safetensors"), read_sketch, tensors_signed),
    Reader("prompts", "tensors", member("prompts.safetensors"), load_prompts, tensors_signed),
    Reader("recipe of a task", "json", make_recipe, read_recipe, record_signed),
    Reader("index of a bank", "json", lambda at: make_bank(at).files.index, read_bank, record_signed),
    Reader("signatures of an old bank", "tensors", make_old_bank, read_bank),
    Reader("index of an old bank", "json", lambda at: BankFolder(make_old_bank(at).parent).index, read_bank),
    Reader("manifest of a masked checkpoint", "json", make_checkpoint("manifest.json", "masked"), read_manifest, manifest_signed),
    Reader("manifest of a dense checkpoint", "json", make_checkpoint("manifest.json", "dense"), read_manifest, manifest_signed),
    Reader(
        "rank file of a masked checkpoint", "tensors", make_checkpoint(RANK, "masked"),
        read_rank_file(lambda folder: load_checkpoint(folder, masked())),
    ),
    Reader(
        "rank file of a dense checkpoint", "tensors", make_checkpoint(RANK, "dense"),
        read_rank_file(lambda folder: load_dense(folder, dense()[0].named_parameters(), dense()[1])),
    ),
    Reader("progress of a method", "json", make_progress, read_progress, record_signed),
    Reader("what a training measured", "json", make_trained, lambda path: kept_trained(path.parents[1], "a"), record_signed),
    Reader("result of a method", "json", make_result, read_result),
    Reader("results of a run", "json", make_page, read_page),
    Reader("densities that raced", "json", make_densities, read_densities, record_signed),
    Reader("record of pruning", "json", make_origin, read_origin),
    Reader("timings", "json", make_timings, read_timings),
    Reader("index of a model", "json", make_model("model.safetensors.index.json"), read_model),
    Reader("config of a model", "json", make_model("config.json"), read_model),
    Reader("weights of a model", "tensors", make_model("*.safetensors"), read_model),
    *people.READERS,
    *jobs.READERS,
    *models.READERS,
    *requests.READERS,
)  # fmt: skip
