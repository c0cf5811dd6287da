"""NF4 layers: the codes are bitsandbytes', forward and backward those of the dequantised weight."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from engine.zamba2 import zamba2_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Zamba2ForCausalLM

from trace_dist import quantize_nf4
from trace_dist.models.loading import load_model
from trace_dist.models.nf4 import NF4Linear, dequantize_weight, named_weights, quantize_weight

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 64), (7, 13), (33, 70), (1, 5)])
def test_values_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    packed, absmax = quantize_weight(weight)
    assert packed.dtype == absmax.dtype == dtype
    padded = F.pad(weight.flatten(), (0, -weight.numel() % 64))
    expected = bnb.dequantize_4bit(*bnb.quantize_4bit(padded, blocksize=64, quant_type="nf4"))
    assert torch.equal(
        dequantize_weight(packed, absmax, shape), expected.flatten()[: weight.numel()].view(shape)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_are_those_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = NF4Linear(nn.Linear(33, 21, dtype=dtype))
    x = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True)
    y, bias = x.detach().clone().requires_grad_(True), layer.bias.detach().clone().requires_grad_(True)
    ours, theirs = layer(x), F.linear(y, layer.weight, bias)
    assert torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def llama(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).to(dtype)


def test_a_model_keeps_its_names_and_shrinks() -> None:
    model = llama()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    before = model.lm_head.weight
    quantize_nf4(model)
    assert {name: tuple(weight.shape) for name, weight in named_weights(model)} == shapes
    assert model.lm_head.weight is before
    layers = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    num_bytes = sum(layer.packed.nbytes + layer.absmax.nbytes for layer in layers)
    assert num_bytes == 0.5625 * sum(layer.in_features * layer.out_features for layer in layers)


def test_a_cast_after_quantising_is_refused() -> None:
    model = quantize_nf4(llama(torch.float32)).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"4-bit words were cast from torch\.float32"):
        model(input_ids=torch.arange(4)[None])


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weights are torch.float64; load the model in bfloat16"):
        quantize_nf4(llama(torch.float64))
    with pytest.raises(ValueError, match=r"no nn.Linear layer to quantise"):
        quantize_nf4(nn.Sequential(nn.LayerNorm(3)))


def test_missing_bitsandbytes_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes .*'trace-dist\[nf4\]'"):
        quantize_weight(torch.ones(64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_while_loading(saved, dtype: str) -> None:
    loaded = load_model(saved("qwen2_moe"), dtype, "nf4").state_dict()
    expected = quantize_nf4(load_model(saved("qwen2_moe"), dtype)).state_dict()
    assert list(loaded) == list(expected)
    assert any(name.endswith("packed") for name in loaded)
    assert all(
        torch.equal(loaded[name].view(torch.uint8), value.view(torch.uint8))
        for name, value in expected.items()
    )


def test_a_tied_head_stays_tied_when_it_is_loaded(tmp_path: Path) -> None:
    """Its file holds the embedding alone."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    saved = LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "float32", "nf4")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)


def test_layers_that_share_a_weight_become_one() -> None:
    """A weight that an embedding has, too, stays as it is."""
    first, second, third = (nn.Linear(64, 64, bias=False) for _ in range(3))
    second.weight = first.weight
    table = nn.Embedding(64, 64)
    third.weight = table.weight
    model = nn.ModuleList([first, second, third, table])
    names = [name for name, _ in named_weights(model)]
    quantize_nf4(model)
    assert model[0] is model[1]
    assert model[2] is third
    assert third.weight is table.weight
    assert [name for name, _ in named_weights(model)] == names
    both = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    both[1].weight = both[0].weight
    with pytest.raises(ValueError, match="0 and 1 share a weight, but no bias; use quantize='none'"):
        quantize_nf4(both)


def test_layers_that_share_a_weight_are_loaded_once(tmp_path: Path) -> None:
    """Blocks of Zamba2 share one transformer layer."""
    saved = Zamba2ForCausalLM(zamba2_config())
    saved.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "float32", "nf4")
    assert [name for name, _ in named_weights(loaded)] == [name for name, _ in named_weights(saved)]
