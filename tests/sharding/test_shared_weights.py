"""Decoder blocks that share weights, as those of Zamba2."""

from __future__ import annotations

import pytest
import torch
from transformers import Zamba2Config, Zamba2ForCausalLM

from trace_dist import quantize_nf4
from trace_dist.sharding.fsdp2 import refuse_shared


@pytest.mark.parametrize("quantize", [False, True])
def test_fsdp2_would_part_them(quantize: bool) -> None:
    config = Zamba2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=4, intermediate_size=64, num_attention_heads=2,
        mamba_ngroups=1, n_mamba_heads=4, mamba_d_state=8, hybrid_layer_ids=[1, 3], num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"] * 2, attention_hidden_size=64, attention_head_dim=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = Zamba2ForCausalLM(config)
    if quantize:
        quantize_nf4(model)
    with pytest.raises(ValueError, match=r"layers\.1\..* and .*layers\.3\..* are one weight in two blocks"):
        refuse_shared(model)
