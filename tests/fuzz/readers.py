"""Every reader of the package: how a whole file is made, and what reads it, as far as a command uses it."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from unittest.mock import patch

import datasets
import gguf
import torch
import yaml
from bank.samples import drawn, small_delta, write_old_bank
from cli.program import make_config
from engine.cases import CASES
from fastapi.testclient import TestClient
from fuzz.mutate import Kind, Sign
from report.samples import make_results
from rich.console import Console
from serving import small
from torch import nn

from trace_dist import Delta, DeltaBank, Mask, MaskedAdamW, shard
from trace_dist.bank.bank import BASE
from trace_dist.bank.prompts import Prompts, load_prompts
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
from trace_dist.models.gguf import convert_gguf
from trace_dist.models.origin import Origin
from trace_dist.probe.learning import Learning
from trace_dist.probe.task import Probed, Tensors
from trace_dist.report import heat, load_results, retrieval, summary_table
from trace_dist.report.markdown import markdown_table
from trace_dist.report.narrative import narrate
from trace_dist.report.results import parse_results
from trace_dist.report.tables import headline
from trace_dist.run_folder import BankFolder
from trace_dist.serving.api import make_app
from trace_dist.serving.gate import Gate
from trace_dist.serving.options import Listening, Source
from trace_dist.serving.router import Router
from trace_dist.serving.tally import Tally
from trace_dist.serving.worker import Worker
from trace_dist.stages.stage import read_timings
from trace_dist.train.loop import TrainResult
from trace_dist.utils.files import write_json
from trace_dist.utils.sealed import json_checksum, write_record

LAYOUTS = {
    "whole": UnitLayout((6, 8), 4),
    "ragged": UnitLayout((3, 5), 2),
    "columns": UnitLayout((6, 8), 6, 8),
}
SCORES = {name: torch.rand(layout.num_units) for name, layout in LAYOUTS.items()}


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: for counts.
        kind: of the file.
        make: writes a whole file (and what belongs to it) into an empty folder, and says which one is damaged.
        read: reads it and uses what it read.
        sign: gives changed content the checksums that fit.
    """

    name: str
    kind: Kind
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    sign: Sign | None = None


def record_signed(value: dict[str, Any]) -> dict[str, Any]:
    """A sealed JSON object."""
    rest = {key: part for key, part in value.items() if key != "checksum"}
    return {**rest, "checksum": json_checksum(rest)}


def manifest_signed(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of a checkpoint."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def tensors_signed(parts: tuple[dict[str, Any], dict[str, Any], bytes]) -> dict[str, Any]:
    """The header of a sealed tensor file, from it, the file's outer header, and the data."""
    inner, outer, data = parts
    digest = hashlib.sha256()
    try:
        for name in sorted(name for name in outer if name != "__metadata__"):
            begin, end = outer[name]["data_offsets"]
            dtype = {"F32": "float32", "I64": "int64", "I32": "int32", "U8": "uint8", "I16": "int16"}
            digest.update(f"{name} torch.{dtype.get(outer[name]['dtype'])} ".encode() + data[begin:end])
    except (KeyError, TypeError, ValueError):
        return inner
    inner = {key: value for key, value in inner.items() if key != "header_checksum"}
    inner |= {"checksum": digest.hexdigest()} if "checksum" in inner else {}
    return {**inner, "header_checksum": json_checksum(inner)}


def silently(work: Callable[[], object]) -> None:
    """Whatever is printed goes nowhere."""
    from contextlib import redirect_stdout

    with redirect_stdout(io.StringIO()):
        work()


class Arguments(dict[str, Any]):
    """Parsed arguments."""

    __getattr__ = dict.__getitem__


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


def make_csv(folder: Path) -> Path:
    lines = ["prompt,answer,more", *(f'"say {i}, please",{i},{i % 3}' for i in range(40))]
    (folder / "task.csv").write_text("\n".join(lines) + "\n")
    return folder / "task.csv"


def make_text(folder: Path) -> Path:
    (folder / "task.txt").write_text("".join(f"line{i} of the text has number {i}\n" for i in range(40)))
    return folder / "task.txt"


def make_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "task.parquet")
    return folder / "task.parquet"


def read_by_datasets(path: Path) -> None:
    """What ``datasets`` keeps of each file goes again."""
    with TemporaryDirectory() as cache, patch.object(datasets.config, "HF_DATASETS_CACHE", Path(cache)):
        read_jsonl(path)


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


def make_gguf(folder: Path) -> Path:
    """A Llama of one layer, with a tokenizer of characters."""
    path, width, words = (
        folder / "model.gguf",
        32,
        ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "ab", "cd"],
    )
    with redirect_stderr(io.StringIO()):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64), writer.add_embedding_length(width), writer.add_block_count(1)
        writer.add_feed_forward_length(width), writer.add_head_count(2), writer.add_head_count_kv(1)
        (
            writer.add_layer_norm_rms_eps(1e-5),
            writer.add_rope_dimension_count(16),
            writer.add_rope_freq_base(1e4),
        )
        writer.add_vocab_size(len(words)), writer.add_tokenizer_model("gpt2"), writer.add_token_list(words)
        writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)]), writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0)
        shapes = {"token_embd": (len(words), width), "output": (len(words), width), "output_norm": (width,)}
        for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.0.{part}"] = (width, width)
        shapes |= {f"blk.0.{part}": (width // 2, width) for part in ("attn_k", "attn_v")}
        shapes |= {f"blk.0.{part}": (width,) for part in ("attn_norm", "ffn_norm")}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", torch.rand(shape).numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
    return path


def read_gguf(path: Path) -> None:
    out = path.with_name("converted")
    try:
        silently(lambda: convert_gguf(str(path), out))
    finally:
        rmtree(out, ignore_errors=True)


# ---- requests


@cache
def served() -> TestClient:
    """A bank behind its server, without the socket."""
    folder = Path(mkdtemp())
    atexit.register(rmtree, folder)
    made = small.make(folder)
    source, limits = Source(str(made.bank), str(made.base)), Listening(max_tokens=2, max_n=2)
    router, tally = Router.of(source), Tally()
    worker = Worker(router, limits, tally)
    worker.start()
    app = Gate(make_app(router, worker, limits, tally), None, limits.max_body_kib * 1024, tally)
    client = TestClient(app, raise_server_exceptions=False)
    # One loop for all requests, as a server has it.
    client.__enter__()
    atexit.register(worker.close)
    atexit.register(client.__exit__)
    return client


def make_request(chat: bool) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        asked: dict[str, Any] = {
            "model": "copy",
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "n": 1,
            "seed": 3,
        }
        asked |= {"stop": ["x"], "stream": False, "user": "u", "logprobs": False}
        if chat:
            asked["messages"] = [{"role": "user", "content": "copy abc"}]
        else:
            asked |= {"prompt": ["copy abc", "fed"], "stream_options": {"include_usage": True}}
        write_json(folder / "asked.json", asked)
        return folder / "asked.json"

    return make


def read_request(path: str) -> Callable[[Path], None]:
    """A refusal has OpenAI's shape, one line, and a status that says whose fault it is."""

    def read(file: Path) -> None:
        answer = served().post(path, content=file.read_bytes(), headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413, 422), f"{answer.status_code} {answer.text[:200]}"
        if answer.status_code != 200:
            message = answer.json()["error"]["message"]
            assert "\n" not in message, message
            raise ValueError(message)

    return read


RANK = "rank-00000.safetensors"
READERS = (
    Reader("configuration", "yaml", make_yaml, read_yaml),
    Reader("data, JSON lines", "lines", make_jsonl, read_jsonl),
    Reader("data, JSON list", "json", make_list, read_list),
    Reader("data, CSV", "text", make_csv, read_by_datasets),
    Reader("data, text", "text", make_text, read_by_datasets),
    Reader("data, Parquet", "binary", make_parquet, read_by_datasets),
    Reader("mask", "tensors", make_mask, read_mask, tensors_signed),
    Reader("saliency map", "tensors", make_saliency, load_saliency, tensors_signed),
    Reader("trace of a probe", "tensors", make_trace, read_trace, tensors_signed),
    Reader("delta", "tensors", member("delta.safetensors"), read_delta, tensors_signed),
    Reader("signature", "tensors", member("signature.safetensors"), read_signature, tensors_signed),
    Reader("sketch", "tensors", member("sketch.safetensors"), read_sketch, tensors_signed),
    Reader("prompts", "tensors", member("prompts.safetensors"), load_prompts, tensors_signed),
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
    Reader("GGUF", "binary", make_gguf, read_gguf),
    Reader("request of a completion", "json", make_request(chat=False), read_request("/v1/completions")),
    Reader("request of a chat", "json", make_request(chat=True), read_request("/v1/chat/completions")),
)  # fmt: skip
