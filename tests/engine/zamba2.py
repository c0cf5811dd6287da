"""A tiny model whose decoder blocks share weights."""

from __future__ import annotations

from transformers import Zamba2Config


def zamba2_config() -> Zamba2Config:
    """Four layers, of which two are hybrid and share one transformer layer."""
    return Zamba2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=4, intermediate_size=64, num_attention_heads=2,
        mamba_ngroups=1, n_mamba_heads=4, mamba_d_state=8, hybrid_layer_ids=[1, 3], num_mem_blocks=1,
        layers_block_type=["mamba", "hybrid"] * 2, attention_hidden_size=64, attention_head_dim=32,
    )  # fmt: skip
