"""Which modules are gathered as one."""

from __future__ import annotations

import pytest
from engine.rank_by_weight import jamba, mamba
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.models.blocks import decoder_blocks

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
)


@pytest.mark.parametrize(
    ("make", "path", "num_layers"),
    [
        (lambda: LlamaForCausalLM(LLAMA), "model.layers", 12),
        (mamba, "backbone.layers", 2),
        (jamba, "model.layers", 2),
    ],
    ids=["llama", "mamba", "jamba"],
)
def test_blocks_are_the_layers_and_never_lie_in_each_other(make, path: str, num_layers: int) -> None:
    assert list(decoder_blocks(make())) == [f"{path}.{layer}" for layer in range(num_layers)]
