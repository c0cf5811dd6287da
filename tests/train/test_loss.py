"""The loss over the families: what the model's forward pass is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.train.loss import forward_nll_sum

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    # No layer has keys, of which a cache would tell the length.
    "jamba": {
        **_COMMON,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "num_experts": 1,
        "mamba_dt_rank": 4,
    },
    "granitemoehybrid": {**_COMMON, **_MAMBA2, "layer_types": ["mamba"] * 2, "num_local_experts": 0},
    # The decoder has more layers than the encoder, after which its cache would be sized.
    "bart": {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_model_without_a_cache(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).train()
    ids = torch.randint(3, 64, (2, 9))
    labels = torch.where(torch.arange(9) < 4, -100, ids)
    found = forward_nll_sum(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(found, expected)
