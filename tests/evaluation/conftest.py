"""A tiny random Llama and a character tokenizer; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters and a space, one token each; eos, no bos, no chat template."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefgh "])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Random weights, large enough that greedy decoding visits many tokens and often stops."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=64,
        initializer_range=1.0,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)
