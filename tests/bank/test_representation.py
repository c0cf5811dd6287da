"""The mean hidden state of a prompt: against one prompt at a time, over ranks, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from trace_dist.bank.representation import alike, pooled, represent, represent_views
from trace_dist.config.bank import Pooling
from trace_dist.utils import dist


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def some_prompts(num: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (num,), generator=generator).tolist()
    return [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_represent_is_the_mean_over_a_prompts_own_tokens(layer: int) -> None:
    model, prompts = tiny_llama().train(), some_prompts()
    found = represent(model, prompts, layer=layer, batch_size=3, pad_id=0)
    assert model.training
    assert found.dtype == torch.float32
    with torch.no_grad():
        for row, prompt in zip(found, prompts, strict=True):
            hidden = model.eval()(torch.tensor([prompt]), output_hidden_states=True).hidden_states[layer][0]
            torch.testing.assert_close(row, hidden.mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last", "max", "mean_std"])
def test_poolings_are_over_a_prompts_own_tokens(pooling: Pooling) -> None:
    model, prompts = tiny_llama(), some_prompts()
    found = represent(model, prompts, layer=1, batch_size=3, pad_id=0, pooling=pooling)
    assert found.dtype == torch.float32
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            states = model.eval()(torch.tensor([prompt]), output_hidden_states=True).hidden_states[1][0]
        x = states.double().numpy()
        expected = {
            "mean": x.mean(axis=0),
            "last": x[-1],
            "max": x.max(axis=0),
            "mean_std": np.concatenate([x.mean(axis=0), x.std(axis=0)]),
        }[pooling]
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "max", "mean_std"])
def test_what_stands_where_padding_is_does_not_matter(pooling: Pooling) -> None:
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    spoiled = states.clone()
    spoiled[0, 2:] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert torch.equal(pooled(spoiled, mask, pooling), pooled(states, mask, pooling))
    assert torch.equal(pooled(spoiled[:1, :2], mask[:1, :2], pooling), pooled(states, mask, pooling)[:1])


def test_one_set_that_is_all_alike_is_enough() -> None:
    varied, same = torch.randn(4, 3), torch.ones(4, 3)
    assert not alike([varied, varied + same])
    assert alike([varied, same])


def test_several_layers_and_poolings_in_one_pass_are_each_as_alone() -> None:
    model, prompts, passes = tiny_llama(), some_prompts(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    poolings = get_args(Pooling)
    found = represent_views(model, prompts, layers=[2, 0, -2], poolings=poolings, batch_size=3, pad_id=0)
    assert len(passes) == -(-len(prompts) // 3)
    assert list(found) == list(poolings)
    for pooling, x in found.items():
        for place, layer in enumerate((2, 0, -2)):
            alone = represent(model, prompts, layer=layer, batch_size=3, pad_id=0, pooling=pooling)
            assert torch.equal(x[:, place], alone)


STREAMS: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "intermediate_size": [48] * 2, "num_key_value_heads": 2, "num_kv_shared_layers": 0, "altup_num_inputs": 3,
        "altup_active_idx": 1, "activation_sparsity_pattern": [0.0] * 2, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 50, "laurel_rank": 4,
    },
    "deepseek_v4": {
        "num_key_value_heads": 1, "n_routed_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "q_lora_rank": 16,
        "qk_rope_head_dim": 4, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 3, "index_head_dim": 8, "index_n_heads": 2,
        "index_topk": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", STREAMS)
def test_several_streams_of_a_layer_are_one(family: str) -> None:
    """Prompts as many and as long as there are streams, so that no size says which dimension is which."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = AutoConfig.for_model(family, **common, pad_token_id=0, **STREAMS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [9, 10, 11], [20, 21, 22]]
    found = represent(model, prompts, layer=1, batch_size=3, pad_id=0)
    assert found.shape == (3, 32)
    for row, prompt in zip(found, prompts, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[1]
        expected = states[1, 0].mean(0) if family == "gemma3n_text" else states[0].mean((0, 1))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_represent_with_learned_positions_and_without_gradients() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    prompts = some_prompts(5)
    one_by_one = represent(model, prompts, layer=-1, batch_size=1, pad_id=0)
    together = represent(model, prompts, layer=-1, batch_size=5, pad_id=49)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)
    assert not together.requires_grad


@pytest.mark.parametrize(
    ("prompts", "changed", "message"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "1 of 2 are empty"),
        ([[1] * 33], {}, "33 tokens do not fit"),
        ([[1]], {"layer": 3}, r"bank\.layer=3: must lie in \[-3, 3\)"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_represent_refuses(prompts: list[list[int]], changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        represent(tiny_llama(), prompts, **{"layer": -1, "batch_size": 2, "pad_id": 0} | changed)


def _represent_on_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model = tiny_llama()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = represent(model, some_prompts(5), layer=-1, batch_size=2, pad_id=0)
    assert dist.gather_objects(len(passes)) == [2, 2]  # 3 batches: the second rank repeats one
    save_file({"x": found}, f"{folder}/{rank}.safetensors")
    dist.close()


def test_ranks_run_equally_many_passes_and_agree_bit_for_bit(tmp_path: Path) -> None:
    mp.spawn(_represent_on_rank, args=(str(tmp_path),), nprocs=2)
    alone = represent(tiny_llama(), some_prompts(5), layer=-1, batch_size=2, pad_id=0)
    for rank in range(2):
        assert torch.equal(load_file(tmp_path / f"{rank}.safetensors")["x"], alone)
