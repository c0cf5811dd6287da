"""Adapters for PEFT and patches for vLLM hold a task bit for bit, or are refused before anything is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.samples import same_bits, signature
from bank.test_export import MIXED
from engine.cases import CASES
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from trace_dist import Delta, DeltaBank, Mask, load_sharded
from trace_dist.bank.composition import compose
from trace_dist.bank.delta import applied
from trace_dist.bank.export import export
from trace_dist.bank.export.peft_shira import differences
from trace_dist.models import fingerprint
from trace_dist.models.rest import CARD

BOTH = ("float32", "bfloat16")


def base_of(folder: Path, family: str = "llama", dtype: str = "float32") -> str:
    model = replace(CASES["element"], family=family, dtype=dtype).model()
    model.save_pretrained(folder)
    return str(folder)


def delta_of(base: str, task: str = "one", seed: int = 1, dtype: str = "float32", **options: Any) -> Delta:
    """Values of every size, from those of a weight down to nothing, where a single difference does not reach all."""
    model = load_sharded(base, dtype)
    options = {"density": 0.06, "granularity": "element"} | options
    mask = Mask.random(model, seed=seed, **options).with_meta(task=task, model=fingerprint(base))
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in mask:
        flat = mask.elements(name)
        sizes = 10.0 ** torch.randint(-9, 3, flat.shape, generator=generator)
        tuned = (torch.randn(len(flat), generator=generator) * sizes).to(model.local(name).dtype)
        tuned[0] = model.local(name)[flat[0]]
        tuned[-1] = 0.0
        values[name] = tuned
    return Delta(mask, values, task)


def bank_of(folder: Path, base: str, *deltas: Delta) -> DeltaBank:
    bank = DeltaBank.create(folder, fingerprint(base), layer=1)
    for seed, delta in enumerate(deltas):
        bank.add(signature(delta.task, seed), delta)
    return bank


def wanted(base: str, delta: Delta, dtype: str) -> dict[str, Tensor]:
    model = load_sharded(base, dtype)
    with applied(model, delta):
        return model.full_state_dict()


def loaded(base: str, dtype: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("dtype", BOTH)
def test_peft_merges_to_our_weights(dtype: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", dtype=dtype)
    delta = delta_of(base, dtype=dtype)
    bank = bank_of(tmp_path / "bank", base, delta)
    for out in ("out", "again"):
        export(bank, ["one"], tmp_path / out, base, kind="peft-shira")
    right = wanted(base, delta, dtype)
    ids = torch.arange(7)[None]
    for low_memory in (False, True):
        adapted = PeftModel.from_pretrained(
            loaded(base, dtype), tmp_path / "out", low_cpu_mem_usage=low_memory
        )
        logits = adapted(ids).logits
        merged = adapted.merge_and_unload()
        assert same_bits(
            merged.state_dict(), {**right, "lm_head.weight": right["model.embed_tokens.weight"]}, dtype
        )
        assert torch.equal(merged(ids).logits, logits)
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert (card["tasks"], card["dtype"], card["base"]["fingerprint"]) == (["one"], dtype, bank.base)
    # Some needed a second difference, and what equals the base none.
    assert card["entries"] == delta.mask.num_entries - len(delta.mask) < card["slots"]
    for name, said in card["files"].items():
        held = (tmp_path / "out" / name).read_bytes()
        assert (len(held), hashlib.sha256(held).hexdigest()) == (said["bytes"], said["sha256"])
        assert held == (tmp_path / "again" / name).read_bytes()
    assert set(card["files"]) | {CARD} == {path.name for path in (tmp_path / "out").iterdir()}


def test_peft_loads_what_tasks_make_together(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "qwen2")
    deltas = [delta_of(base, task, seed, density=0.03) for seed, task in enumerate(("one", "two"))]
    bank = bank_of(tmp_path / "bank", base, *deltas)
    export(
        bank, ["one", "two"], tmp_path / "out", base, kind="peft-shira", options={"composition": "average"}
    )
    merged = PeftModel.from_pretrained(loaded(base, "float32"), tmp_path / "out").merge_and_unload()
    delta = compose(deltas, load_sharded(base, "float32"), "both", "average")
    assert same_bits(merged.state_dict(), wanted(base, delta, "float32"), "float32")
    assert json.loads((tmp_path / "out" / CARD).read_text())["composition"] == "average"


def test_no_sum_makes_a_negative_zero() -> None:
    own, tuned = torch.tensor([0.5, -0.0]), torch.tensor([-0.0, -0.0])
    flat, values = differences("w", torch.tensor([3, 8]), own[1:].repeat(2), tuned)
    assert len(flat) == len(values) == 0
    with pytest.raises(
        ValueError, match=r"w\[3\] is -0.0, which no sum of differences makes of the base's 0.5"
    ):
        differences("w", torch.tensor([3, 8]), own, tuned)


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"maskable": "norm|embed|q_proj"}, "model.embed_tokens.weight (of a Embedding)"),
        ("llama", {"maskable": "norm"}, "model.norm.weight (of a LlamaRMSNorm)"),
        ("gpt2", {}, "transformer.h.0.attn.c_attn.weight (of a Conv1D)"),
        ("opt", {"maskable": "q_proj"}, "model.decoder.layers.0.self_attn.q_proj.bias (a bias)"),
        ("qwen2_moe", {}, "model.layers.0.mlp.experts.gate_up_proj (of a Qwen2MoeExperts)"),
        ("llama", {"density": 0.9}, "needs r="),
    ],
)
def test_what_shira_cannot_hold(family: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", family)
    bank = bank_of(tmp_path / "bank", base, delta_of(base, **options))
    with pytest.raises(ValueError, match="export it as hf or vllm-patch") as caught:
        export(bank, ["one"], tmp_path / "out", base, kind="peft-shira")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


class Served:
    """As a server holds a Llama: queries, keys and values in one weight, gate and up in another; filled by ``load_weights``."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, list[Tensor]] = {}
        self.places: dict[str, tuple[str, int]] = {}
        for name, value in state.items():
            module = name.split(".")[-2]
            home = name.replace(module, FUSED.get(module, module))
            self.places[name] = home, sum(map(len, parts.setdefault(home, [])))
            parts[home].append(value)
        self.held = {home: torch.cat(values) for home, values in parts.items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in weights:
            home, row = self.places[name]
            self.held[home][row : row + len(value)].copy_(value)


def patches(folder: Path, file: str) -> Iterator[dict[str, Any]]:
    """The fields of vLLM's CheckpointWeightPatch."""
    info = json.loads((folder / "update_info.json").read_text())
    columns = [info[key] for key in ("names", "dtype_names", "shapes", "num_updates_list")]
    with safe_open(folder / file, "pt") as tensors:
        assert json.loads(tensors.metadata()["changed_params"]) == info["names"]
        for name, dtype, shape, number in zip(*columns, strict=True):
            indices, values = (tensors.get_tensor(f"{name}.{kind}") for kind in ("indices", "values"))
            assert (indices.dtype, values.dtype) == (torch.int32, getattr(torch, dtype))
            assert indices.shape == values.shape == (number,)
            yield {"name": name, "shape": shape, "dtype": values.dtype, "values": values, "indices": indices}


def load_patches(model: Any, given: Iterable[dict[str, Any]]) -> None:
    """As vLLM's ``load_checkpoint_weight_patches`` does it: what it refuses fails here, and loaders copy all that is not NaN.

    Read in vLLM's ``checkpoint_weight_patch.py`` and ``sparse_nccl_engine.py`` of November 2026.
    """
    staged = []
    for patch in given:
        name, shape, dtype, values, indices = (
            patch[key] for key in ("name", "shape", "dtype", "values", "indices")
        )
        assert name
        assert dtype.is_floating_point
        assert values.ndim == indices.ndim == 1
        assert len(values) == len(indices) > 0
        assert indices.dtype == torch.int32, "what its trainer's side takes"
        assert int(indices.min()) >= 0
        assert int(indices.max()) < math.prod(shape)
        assert not values.isnan().any()
        assert len(indices.unique()) == len(indices)
        flat = torch.full((math.prod(shape),), math.nan, dtype=dtype)
        flat.index_copy_(0, indices.long(), values.to(dtype))
        staged.append((name, flat.view(shape)))
    copy = torch.Tensor.copy_

    def copy_numbers(place: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
        assert place.shape == value.shape
        return copy(place, torch.where(value.isnan(), place, value.to(place.dtype)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", copy_numbers)
        model.load_weights(staged)


def state_of(base: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they lie there."""
    with safe_open(Path(base) / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen2_moe", "float32"), ("gpt2", "bfloat16")],
)
def test_a_patch_in_a_server_with_fused_weights(family: str, dtype: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", family, dtype)
    delta = delta_of(base, dtype=dtype, maskable="all")
    bank = bank_of(tmp_path / "bank", base, delta)
    export(bank, ["one"], tmp_path / "out", base, kind="vllm-patch")
    before = state_of(base)
    model = load_sharded(base, dtype)
    with applied(model, delta):
        model.save_pretrained(tmp_path / "tuned")
    after = state_of(str(tmp_path / "tuned"))
    served = Served(before)
    load_patches(served, patches(tmp_path / "out", "patch.safetensors"))
    assert not same_bits(Served(before).held, served.held, dtype)
    assert same_bits(Served(after).held, served.held, dtype)
    load_patches(served, patches(tmp_path / "out", "undo.safetensors"))
    assert same_bits(Served(before).held, served.held, dtype)
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert card["entries"] == delta.mask.num_entries
    assert set(card["files"]) == {"patch.safetensors", "undo.safetensors", "update_info.json"}


def test_a_patch_of_a_composition_and_of_a_file(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    deltas = [delta_of(base, task, seed) for seed, task in enumerate(("one", "two"))]
    bank = bank_of(tmp_path / "bank", base, *deltas)
    both = compose(deltas, load_sharded(base, "float32"), "one+two", "ties")
    both.save(tmp_path / "both.safetensors")
    export(bank, ["one", "two"], tmp_path / "a", base, kind="vllm-patch", options={"composition": "ties"})
    export(bank, [], tmp_path / "b", base, kind="vllm-patch", files=[tmp_path / "both.safetensors"])
    for file in ("patch.safetensors", "undo.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_patch_of_a_family_that_keeps_some_tensors_in_fp32(tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **MIXED), dtype=torch.bfloat16)
    model.save_pretrained(base)
    delta = delta_of(base, dtype="bfloat16", maskable=r"mlp\.gate\.weight|q_proj")
    assert {values.dtype for values in delta.values.values()} == {torch.float32, torch.bfloat16}
    export(bank_of(tmp_path / "bank", base, delta), ["one"], tmp_path / "out", base, kind="vllm-patch")
    with safe_open(tmp_path / "out" / "patch.safetensors", "pt") as file:
        for name, values in delta.values.items():
            assert torch.equal(file.get_tensor(f"{name}.values"), values)


def test_what_a_patch_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Banks of earlier releases may hold NaN.
    monkeypatch.setattr(Delta, "check_finite", lambda _: None)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 11}
    mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **small))
    mamba.save_pretrained(tmp_path / "mamba")
    other = delta_of(str(tmp_path / "mamba"), maskable="A_log|in_proj")
    base = base_of(tmp_path / "base")
    delta = delta_of(base)
    broken = delta_of(base)
    name = next(iter(broken.values))
    broken.values[name][2] = math.nan
    for number, (path, each, dtype, words) in enumerate(
        (
            (str(tmp_path / "mamba"), other, "auto", r"A_log \(which vLLM computes from the checkpoint's\)"),
            (base, broken, "auto", f"{name} of delta 'one' holds NaN, which means unchanged"),
            (
                base,
                delta,
                "bfloat16",
                "dtype='bfloat16': the deltas hold float32, and vllm-patch keeps values as they are; leave it out",
            ),
        )
    ):
        bank = bank_of(tmp_path / f"bank-{number}", path, each)
        with pytest.raises(ValueError, match=words):
            export(bank, ["one"], tmp_path / "out", path, dtype, "vllm-patch")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["peft-shira", "vllm-patch"])
def test_the_base_alone_is_no_task(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    bank = bank_of(tmp_path / "bank", base)
    bank.add(signature("base", 0), None)
    with pytest.raises(ValueError, match="task: the base alone makes no"):
        export(bank, ["base"], tmp_path / "out", base, kind=kind)


def classifier_of(folder: Path) -> str:
    """A classifier of images, which has a processor and no tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(
        image_size=8, patch_size=4, **sizes, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 8, "width": 8}}')
    return str(folder)


def test_a_task_of_images(tmp_path: Path) -> None:
    base = classifier_of(tmp_path / "base")
    delta = delta_of(base, density=0.05, maskable=r"(q_proj|fc\d)\.weight")
    bank = bank_of(tmp_path / "bank", base, delta)
    export(bank, ["one"], tmp_path / "hf", base)
    right = wanted(base, delta, "float32")
    found = ViTForImageClassification.from_pretrained(tmp_path / "hf")
    assert same_bits(found.state_dict(), right, "float32")
    before = (tmp_path / "base" / "preprocessor_config.json").read_bytes()
    assert (tmp_path / "hf" / "preprocessor_config.json").read_bytes() == before
    export(bank, ["one"], tmp_path / "shira", base, kind="peft-shira")
    assert json.loads((tmp_path / "shira" / "adapter_config.json").read_text())["task_type"] is None
    adapted = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(base), tmp_path / "shira")
    assert same_bits(adapted.merge_and_unload().state_dict(), right, "float32")


def test_one_form_after_another_in_one_folder(tmp_path: Path) -> None:
    """What the one left is not read with the other."""
    base = base_of(tmp_path / "base")
    bank = bank_of(tmp_path / "bank", base, delta_of(base))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    for kind in ("peft-shira", "vllm-patch", "hf", "peft-shira", "hf"):
        export(bank, ["one"], tmp_path / "out", base, kind=kind)
        listed = json.loads((tmp_path / "out" / CARD).read_text())["files"]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*listed, CARD, "NOTES.md"}
    assert same_bits(loaded(str(tmp_path / "out"), "float32").state_dict(),
                     loaded_with(bank, base).state_dict(), "float32")  # fmt: skip


def loaded_with(bank: DeltaBank, base: str) -> PreTrainedModel:
    model = load_sharded(base, "float32")
    with applied(model, bank.delta("one")):
        state = model.full_state_dict()
    module = loaded(base, "float32")
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("held", BOTH)
@pytest.mark.parametrize("asked", BOTH)
def test_a_checkpoint_is_rounded_to_what_is_asked_for(held: str, asked: str, tmp_path: Path) -> None:
    """Tied weights too, once."""
    base = base_of(tmp_path / "base", dtype=held)
    delta = delta_of(base, dtype=held)
    export(bank_of(tmp_path / "bank", base, delta), ["one"], tmp_path / "out", base, asked)
    right = {name: value.to(getattr(torch, asked)) for name, value in wanted(base, delta, held).items()}
    found = state_of(str(tmp_path / "out"))
    assert found.keys() == state_of(base).keys()
    assert same_bits(found, {name: right[name] for name in found}, asked)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == asked
