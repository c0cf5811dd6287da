"""Layouts and models whose sizes nothing divides."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.masks import UnitLayout


@pytest.fixture
def tiny() -> LlamaForCausalLM:
    """Two layers, hidden 36, three heads, tied embeddings."""
    config = LlamaConfig(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        intermediate_size=50,
        vocab_size=101,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@pytest.fixture
def layouts() -> dict[str, UnitLayout]:
    """A matrix with whole units, a ragged one, a vector."""
    return {"whole": UnitLayout((6, 8), 4), "ragged": UnitLayout((5, 10), 4), "vector": UnitLayout((7,), 1)}
