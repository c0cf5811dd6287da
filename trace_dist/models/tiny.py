"""Llamas small enough to be trained on the spot, in two sizes of one family if need be."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.config import TinyConfig
from trace_dist.models.tokenizer import BOS_ID, EOS_ID, PAD_ID

MAX_POSITIONS = 256


def build_tiny(cfg: TinyConfig, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings, in fp32, in training mode.

    The global random state is left as it was. Ids of special tokens are those of ``char_tokenizer``.

    Args:
        cfg: sizes.
        vocab_size: ``len(tokenizer)``.
        seed: seed of the initial weights.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        intermediate_size=cfg.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
