"""Exporters: the one that is there, and one that is dropped in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bank.samples import base_model, make_delta, same_bits, signature
from engine.cases import CASES
from full_disk import full_disk
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from trace_dist import Delta, DeltaBank, Mask
from trace_dist.bank.bank import BASE
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.bank.export import export
from trace_dist.bank.export.together import held_dtypes
from trace_dist.bank.verify import verify
from trace_dist.models import fingerprint
from trace_dist.models.rest import CARD
from trace_dist.parts import EXPORTERS
from trace_dist.sharding.build import load_sharded

MIXED = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPORTER = '''
"""Writes what it was given."""
import json
from dataclasses import dataclass

label = "a list"

@dataclass(frozen=True)
class Options:
    """Options."""
    indent: int = 0
    """Spaces."""

def write(deltas, out, base, dtype, options):
    out.mkdir()
    tasks, sizes = [delta.task for delta in deltas], [delta.mask.num_entries for delta in deltas]
    (out / "list.json").write_text(json.dumps([tasks, sizes, base, dtype, options.indent]))
'''


@pytest.fixture
def base(tmp_path: Path) -> str:
    CASES["element"].model().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def bank(base: str, tmp_path: Path) -> DeltaBank:
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(base), layer=1)
    bank.add(signature(BASE, 0), None)
    for seed, task in ((1, "one"), (2, "two")):
        bank.add(signature(task, seed), make_delta(base_model(), task, seed))
    return bank


@pytest.mark.parametrize("kind", ["sum", "average"])
@pytest.mark.parametrize("tasks", [["one"], [BASE], ["one", "two"], ["one", BASE]])
def test_a_checkpoint(tasks: list[str], kind: str, bank: DeltaBank, base: str, tmp_path: Path) -> None:
    export(bank, tasks, tmp_path / "out", base, options={"composition": kind})
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    model = base_model()
    deltas = [delta for task in tasks if (delta := bank.delta(task))]
    delta = deltas[0] if len(deltas) == 1 else compose(deltas, model, "all", kind) if deltas else None
    with applied(model, delta):
        wanted = model.full_state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (Path(base) / file).read_bytes()


def test_a_delta_that_is_no_task_of_the_bank(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    model = base_model()
    both = compose([delta for task in ("one", "two") if (delta := bank.delta(task))], model, "consolidated")
    both.save(tmp_path / "consolidated.safetensors")
    export(bank, [], tmp_path / "out", base, files=[tmp_path / "consolidated.safetensors"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    with applied(model, both):
        wanted = model.full_state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    replace(both, mask=both.mask.with_meta(model="bbbb")).save(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign.safetensors: made for model bbbb, but the model given is"):
        export(bank, [], tmp_path / "no", base, files=[tmp_path / "foreign.safetensors"])


def test_a_dropped_in_exporter(
    bank: DeltaBank, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_list_exporter.py").write_text(EXPORTER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(EXPORTERS.homes, "list", "own_list_exporter")
    export(bank, ["two", "one"], tmp_path / "out", base, "bfloat16", "list", {"indent": 3})
    text = (tmp_path / "out" / "list.json").read_text()
    entries = [bank.facts(task)["entries"] for task in ("two", "one")]
    assert text == f'[["two", "one"], {entries}, "{base}", "bfloat16", 3]'


def test_refusals_come_before_the_work(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    other = tmp_path / "other"
    model = CASES["element"].model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    model.save_pretrained(other)
    for arguments, words in (
        ((bank, ["three"], tmp_path / "out", base), "task='three': not in the bank"),
        ((bank, [], tmp_path / "out", base), "name at least one"),
        ((bank, ["one"], tmp_path / "file", base), "is a file; give a folder"),
        ((bank, ["one"], tmp_path / "out", str(other)), "made for the model with fingerprint"),
        ((bank, ["one", "two", "one"], tmp_path / "out", base), "task='one': is given twice; name it once"),
        ((bank, ["one"], Path(base), base), r"base': is the folder of the base model"),
        ((bank, ["one"], Path(base) / "out", base), r"out': lies in the folder of the base model"),
        ((bank, ["one"], tmp_path, base), "holds the folder of the base model"),
        ((bank, ["one"], bank.folder / "tasks" / "out", base), "lies in the folder of the bank"),
        ((bank, ["one"], other, base), r"holds model\.safetensors, which no export wrote"),
        (
            (bank, ["one"], tmp_path / "out", base, "bfloat16", "peft-shira"),
            "the deltas hold float32, and peft-shira keeps values as they are; leave it out, or export as hf",
        ),
        (
            (bank, ["one"], tmp_path / "out", base, "float32", "gguf"),
            "there is no such part; choose among hf",
        ),
        ((bank, ["one"], tmp_path / "out", base, "float32", "hf", {"x": 1}), "its options are composition"),
    ):
        with pytest.raises(ValueError, match=words):
            export(*arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_tasks_whose_masks_are_of_several_kinds(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    model = load_sharded(base, "float32")
    other = make_delta(model, "three", 3, granularity="row", density=0.2, maskable="linear")
    bank.add(signature("three", 3), other)
    export(bank, ["one", "three"], tmp_path / "out", base)
    with applied(model, compose([make_delta(model, "one", 1), other], model, "both")):
        wanted = model.full_state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same_bits(found, wanted, "float32")


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_deltas_of_two_data_types_are_refused_before_the_work(
    asked: str, bank: DeltaBank, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_delta(base_model("bfloat16"), "other", 4).save(tmp_path / "other.safetensors")
    monkeypatch.setattr("trace_dist.bank.export.hf.load_sharded", never)
    with pytest.raises(
        ValueError, match=f"dtype='{asked}': the deltas hold bfloat16 and float32; export those"
    ):
        export(bank, ["one"], tmp_path / "out", base, asked, files=[tmp_path / "other.safetensors"])


def test_a_place_that_takes_no_model_is_refused_before_the_work(
    bank: DeltaBank, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_dist.bank.export.hf.load_sharded", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out: cannot be written \(.*another folder"):
        export(bank, ["one"], tmp_path / "file" / "out", base)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("trace_dist.utils.files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"out: 0\.1 MiB are needed but 0\.0 MiB are free"):
        export(bank, ["one"], tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def never(*_: object) -> None:
    raise AssertionError("the base was loaded")


def test_a_base_that_was_changed_anywhere_is_refused(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    """In one bit of one value that no sample holds."""
    model = CASES["element"].model()
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight.view(torch.int32)[7, 11] ^= 1
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="some of the weights were changed since"):
        export(bank, ["one"], tmp_path / "out", str(tmp_path / "changed"))
    with pytest.raises(ValueError, match="made for the base model"):
        DeltaBank.create(bank.folder, fingerprint(tmp_path / "changed"), layer=1)


def test_a_bank_of_an_earlier_release_learns_the_whole_identity(base: str, tmp_path: Path) -> None:
    """Its index has 32 digits of it; the first task that is added brings the rest."""
    whole = fingerprint(base)
    old = DeltaBank.create(tmp_path / "old", whole[:32], layer=1)
    delta = make_delta(base_model(), "one", 1)
    old.add(signature("one", 1), replace(delta, mask=delta.mask.with_meta(model=whole[:32])))
    assert old.base == whole[:32]
    export(old, ["one"], tmp_path / "out", base)
    again = DeltaBank.create(tmp_path / "old", whole, layer=1)
    delta = make_delta(base_model(), "two", 2)
    again.add(signature("two", 2), replace(delta, mask=delta.mask.with_meta(model=whole)))
    assert again.base == whole
    assert verify(again) == []


def test_what_lay_in_the_folder_stays_where_an_export_fails(
    bank: DeltaBank, base: str, tmp_path: Path
) -> None:
    export(bank, ["one"], tmp_path / "out", base)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with full_disk(), pytest.raises(ValueError, match="out: cannot be written"):
        export(bank, ["two"], tmp_path / "out", base)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_the_delta_of_a_task_that_is_named_as_well(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"delta=.*: task 'one' is given twice; name it once"):
        export(bank, ["one"], tmp_path / "out", base, files=[bank.path("one")])
    assert not (tmp_path / "out").exists()


def test_the_folder_that_one_is_in(
    bank: DeltaBank, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    export(bank, ["one"], ".", base)
    AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    assert not list(tmp_path.glob(".in*"))


def test_a_base_without_tokenizer(tmp_path: Path) -> None:
    """And the Python code of one that nobody trusts stays where it is."""
    CASES["element"].model().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "modeling_own.py").write_text("")
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(tmp_path / "base"), layer=1)
    bank.add(signature(BASE, 0), None)
    export(bank, [BASE], tmp_path / "out", str(tmp_path / "base"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "trace_dist.json"}


def test_all_chat_templates_of_a_base_go_along(bank: DeltaBank, base: str, tmp_path: Path) -> None:
    """Those beside the default one lie in a folder of their own; an export into the folder of an earlier one has them, too."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    kinds = {"default": "{{ messages[0]['content'] }}", "tool_use": "tools: {{ messages[0]['content'] }}"}
    tokenizer.chat_template = kinds
    tokenizer.save_pretrained(base)
    (Path(base) / "own.tiktoken").write_text("YQ== 0")
    for _ in range(2):
        export(bank, ["one"], tmp_path / "out", base)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == kinds
        assert (tmp_path / "out" / "own.tiktoken").is_file()
    assert (
        "additional_chat_templates/tool_use.jinja"
        in json.loads((tmp_path / "out" / CARD).read_text())["files"]
    )


def test_a_family_that_keeps_some_tensors_in_fp32(tmp_path: Path) -> None:
    """The model was loaded in bfloat16; a mask may hold its router, which stays in fp32."""
    folder, seen = str(tmp_path / "base"), {}
    config = AutoConfig.for_model("glm4_moe", **MIXED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = load_sharded(folder, "bfloat16")
    mask = Mask.random(model, 0.5, maskable=r"mlp\.gate\.weight|q_proj").with_meta(model=fingerprint(folder))
    values = {name: (model.local(name)[mask.elements(name)] + 1) for name in mask}
    assert {each.dtype for each in values.values()} == {torch.float32, torch.bfloat16}
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(folder), layer=1)
    bank.add(signature(BASE, 0), None)
    bank.add(signature("one", 1), Delta(mask, values, "one"))
    for dtype in ("auto", "bfloat16", "float32"):
        export(bank, ["one"], tmp_path / dtype, folder, dtype)
        loaded = load_sharded(str(tmp_path / dtype), "bfloat16")
        seen[dtype] = {name: loaded.local(name)[mask.elements(name)] for name in mask}
    for found in seen.values():
        assert all(torch.equal(found[name], values[name]) for name in mask)


def test_a_task_of_fp32_tensors_alone_is_of_the_models_dtype(tmp_path: Path) -> None:
    """A router's, which stays in fp32: tasks of the same bfloat16 model stand beside it, before or after, and one of float32 does
    not."""
    folder = str(tmp_path / "base")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **MIXED)).save_pretrained(folder)
    model = load_sharded(folder, "bfloat16")
    assert model.dtype == torch.bfloat16
    deltas = {}
    for task, names in (
        ("router", r"mlp\.gate\.weight"),
        ("query", "q_proj"),
        ("again", r"mlp\.gate\.weight"),
    ):
        mask = Mask.random(model, 0.5, maskable=names).with_meta(dtype="of another")
        deltas[task] = extract_delta(model, mask, task)
    assert {each.dtype for each in deltas["router"].values.values()} == {torch.float32}
    assert "dtype" not in deltas["query"].mask.meta
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(folder), layer=1)
    for number, (task, delta) in enumerate(deltas.items()):
        bank.add(signature(task, number), delta)
    assert bank.facts("router")["dtype"] == "bfloat16+float32"
    assert held_dtypes([deltas["router"]]) == ["bfloat16"]
    wide = load_sharded(folder, "float32")
    late = extract_delta(wide, Mask.random(wide, 0.5, maskable=r"mlp\.gate\.weight"), "late")
    with pytest.raises(ValueError, match=r"holds float32: the tasks of the bank .* are bfloat16"):
        bank.add(signature("late", 9), late)


def test_what_a_family_keeps_in_fp32_is_not_rounded(tmp_path: Path) -> None:
    """Learned in float32 and written in bfloat16: the router's weights and biases are those that bfloat16 models have."""
    folder = str(tmp_path / "base")
    router = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **MIXED))
    for name, buffer in router.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_()
    router.save_pretrained(folder)
    model = load_sharded(folder, "float32")
    mask = Mask.random(model, 0.5, maskable=r"mlp\.gate\.weight|q_proj").with_meta(model=fingerprint(folder))
    values = {name: (model.local(name)[mask.elements(name)] + 1) for name in mask}
    bank = DeltaBank.create(tmp_path / "bank", fingerprint(folder), layer=1)
    bank.add(signature("one", 1), Delta(mask, values, "one"))
    export(bank, ["one"], tmp_path / "out", folder, "bfloat16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name, value in found.items() if value.dtype == torch.float32]
    with applied(model, Delta(mask, values, "one")):
        right = model.full_state_dict()
    assert sorted(name.rpartition(".mlp.gate.")[2] for name in kept) == ["e_score_correction_bias", "weight"]
    assert all(
        torch.equal(found[name], right[name].to(found[name].dtype)) for name in found if "experts" not in name
    )
