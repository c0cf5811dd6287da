"""Models of several kinds, each with what reads it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
}
LLAMA = {**SIZES, "num_hidden_layers": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def with_a_bigger_head() -> nn.Module:
    """Its config does not say how it is built."""
    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3))
    model.dropout_head = nn.Linear(3, 3)
    return model


MAKERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "causal": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), AutoModelForCausalLM),
    "tied": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), AutoModelForCausalLM),
    "classifier": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
        AutoModelForSequenceClassification,
    ),
    "bert classifier": (
        lambda: BertForSequenceClassification(BertConfig(**LLAMA)),
        AutoModelForSequenceClassification,
    ),
    "masked": (lambda: BertForMaskedLM(BertConfig(**LLAMA)), AutoModelForMaskedLM),
    "encoder": (lambda: BertModel(BertConfig(**LLAMA)), AutoModel),
    "encoder without pooler": (
        lambda: BertModel(BertConfig(**LLAMA), add_pooling_layer=False),
        lambda *args, **kwargs: AutoModel.from_pretrained(*args, add_pooling_layer=False, **kwargs),
    ),
    "seq2seq": (lambda: T5ForConditionalGeneration(T5Config(**T5)), AutoModelForSeq2SeqLM),
    "another head": (with_a_bigger_head, AutoModelForSequenceClassification),
}


def make(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[name][0]().to(dtype)


def load(name: str, folder: Path) -> nn.Module:
    """Read back in the dtype that config.json states."""
    reader = MAKERS[name][1]
    return getattr(reader, "from_pretrained", reader)(folder, dtype="auto")
