"""In which dtype FSDP2 reduces the gradients that hooks catch, whatever the model has done before."""

from __future__ import annotations

import pytest
import torch
from engine.cases import CASES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.fsdp2 import Fsdp2Model

IDS = torch.arange(3, 15).view(2, 6)
GATE, EXPERTS = r"mlp\.gate\.weight", "experts"


def mixed() -> PreTrainedModel:
    """A family whose routers stay in fp32."""
    config = AutoConfig.for_model(
        "glm4_moe", vocab_size=32, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def step(model: ShardedModel, maskable: str) -> list[torch.Tensor]:
    """The gradients of one pass through a new mask, which is then trained."""
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, seed=0, maskable=maskable), lr=0.0)
    model.backward(model(input_ids=IDS, labels=IDS).loss)
    grads = [support.grad.clone() for support in optimizer.supports]
    optimizer.step()
    return grads


@pytest.mark.parametrize("evaluated", [False, True])
def test_in_fp32_also_where_the_model_was_evaluated_first(evaluated: bool) -> None:
    model = shard(CASES["bf16"].model(), "fsdp2")
    assert isinstance(model, Fsdp2Model)
    if evaluated:
        with torch.no_grad():
            model(input_ids=IDS)
    step(model, "norm")
    for part in model._param_groups():
        assert (part._orig_dtype, part._reduce_dtype) == (torch.bfloat16, torch.float32)


def test_masks_of_two_dtypes_one_after_the_other() -> None:
    model, other = shard(mixed(), "fsdp2"), shard(mixed(), "single")
    for maskable in (EXPERTS, GATE, EXPERTS):
        for found, expected in zip(step(model, maskable), step(other, maskable), strict=True):
            assert bool(found.any())
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)


def test_masks_of_two_dtypes_at_once_are_refused() -> None:
    model = shard(mixed(), "fsdp2")
    first = MaskedAdamW(model, Mask.random(model, 0.5, seed=0, maskable=EXPERTS))
    with pytest.raises(ValueError, match=r"gate\.weight' in float32.* cannot reduce together; leave one out"):
        MaskedAdamW(model, Mask.random(model, 0.5, seed=0, maskable="all"))
    assert model.is_attached(first.supports)
