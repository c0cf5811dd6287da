"""Weights that others have quantised are refused in one line, by every loader, before weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trace_dist import Mask, load_sharded, shard
from trace_dist.models import quantised
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model, load_model_fsdp2, load_model_zero3
from trace_dist.models.prune import depth_prune
from trace_dist.models.weight_files import WEIGHTS, WeightFiles
from trace_dist.profiling.estimate import Estimator
from trace_dist.sharding.prepared import as_sharded

ZERO3: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def never(*_: Any) -> None:
    raise AssertionError("the model was touched")


LOADERS: dict[str, Callable[[Path], Any]] = {
    "whole": load_model,
    "nf4": lambda folder: load_model(folder, quantize="nf4"),
    "zero3": lambda folder: load_model_zero3(folder, "float32", ZERO3),
    "fsdp2": lambda folder: load_model_fsdp2(folder, "float32", never, torch.device("cpu"), never),
    "load_sharded": lambda folder: load_sharded(str(folder), "float32"),
    "fingerprint": fingerprint,
    "prune": lambda folder: depth_prune(folder, 1, folder.parent / "proxy"),
}
METHODS = (
    *(
        "bitsandbytes",
        "gptq",
        "awq",
        "compressed-tensors",
        "torchao",
        "hqq",
        "fp8",
        "mxfp4",
        "quanto",
        "eetq",
    ),
    *("higgs", "aqlm", "bitnet", "vptq", "fbgemm_fp8", "quark", "auto-round", "no-such-method"),
)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensor", "read"):
        monkeypatch.setattr(WeightFiles, name, never)


def one_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_every_loader_refuses(load: Callable[[Path], Any], saved, unread) -> None:
    folder = saved("llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ValueError, match=r"^model\.path=.*quantised \(gptq\); give a checkpoint in bfloat16"
    ) as caught:
        load(folder)
    one_line(caught)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_refused_by_name(method: str, saved, unread) -> None:
    folder = saved("llama")
    edit_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(ValueError, match=rf"weights are quantised \({method}\)") as caught:
        load_model(folder)
    one_line(caught)


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"load_in_4bit": True}},
        {"compression_config": {"format": "pack-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    ],
)
def test_wherever_the_config_says_it(changes: dict[str, Any], saved, unread) -> None:
    folder = saved("llama")
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match="weights are quantised"):
        load_model(folder)


@pytest.mark.parametrize("file", ["quantize_config.json", "quanto_qmap.json", "hf_quant_config.json"])
def test_a_file_beside_the_config_says_it(file: str, saved, unread) -> None:
    folder = saved("llama")
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"weights are quantised \(.*it holds a {file}\)"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.weight", torch.float8_e4m3fn),
        ("model.layers.0.mlp.up_proj.weight", torch.int8),
        ("model.layers.0.mlp.up_proj.qweight", torch.int32),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.uint8),
        ("model.layers.0.mlp.experts.down_proj_blocks", torch.uint8),
    ],
)
def test_a_config_that_says_nothing_does_not_hide_codes(
    name: str, dtype: torch.dtype, make_model, tmp_path, unread
):
    make_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file({**tensors, name: torch.ones(4, 4).to(dtype)}, tmp_path / WEIGHTS, {"format": "pt"})
    for load in (load_model, LOADERS["zero3"]):
        with pytest.raises(ValueError, match=rf"weights are quantised \({name} is stored as"):
            load(tmp_path)


def test_integers_that_stand_for_no_weights_are_let_through() -> None:
    quantised.refuse_quantised_tensors(
        {"h.0.attn.bias": "U8", "h.0.attn.masked_bias": "BOOL", "position_ids": "I64", "a.weight": "BF16"},
        "model",
    )


def test_a_null_section_is_none(saved) -> None:
    folder = saved("llama")
    edit_config(folder, quantization_config=None)
    assert load_model(folder)


def test_gguf_files_and_adapters_are_no_checkpoints(make_model, tmp_path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        with pytest.raises(ValueError, match=r"GGUF.*name .* as model\.gguf") as caught:
            load_model(path)
        one_line(caught)
    (tmp_path / "adapter").mkdir()
    make_model("llama").save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for load in (load_model, LOADERS["zero3"]):
        with pytest.raises(ValueError, match=r"PEFT adapter; merge it into its base"):
            load(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.safetensors'.*a file; give the folder that holds it"):
        load_model(tmp_path / "adapter" / "model.safetensors")


def with_bitsandbytes(model: torch.nn.Module) -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model.set_submodule("model.layers.0.mlp.up_proj", bnb.nn.Linear4bit(36, 50, bias=False))
    return model


def flagged(model: torch.nn.Module) -> torch.nn.Module:
    """As transformers marks a model whose codes lie in buffers."""
    model.is_quantized, model.quantization_method = True, "gptq"
    return model


def in_bytes(model: torch.nn.Module) -> torch.nn.Module:
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize("spoil", [with_bitsandbytes, flagged, in_bytes])
@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: peft_wrapped(model)], ids=["plain", "peft"]
)
@pytest.mark.parametrize("enter", [shard, as_sharded, Mask.random])
def test_models_in_memory_are_refused(spoil, wrap, enter, make_model) -> None:
    model = wrap(make_model("llama"))
    spoil(getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model)
    with pytest.raises(ValueError, match=r"^model: its weights are quantised") as caught:
        enter(model, **({"density": 0.5} if enter == Mask.random else {}))
    one_line(caught)


def peft_wrapped(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def test_no_memory_is_planned_for_weights_that_are_not_trained(saved) -> None:
    """The estimate was that of plain weights, and the training refuses these."""
    folder = saved("llama")
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    for model in (folder, folder / "config.json"):
        with pytest.raises(
            ValueError, match=r"^model='.*': its weights are quantised \(fp8\); give a"
        ) as caught:
            Estimator(str(model), "bfloat16")
        one_line(caught)
