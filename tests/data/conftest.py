"""Tokenizers built on the spot, and a cache of this test's own."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}"
    "{% if m['role'] == 'user' %}<sep>{% else %}<end>\n{% endif %}{% endfor %}"
)
# Writes the user turn differently once an answer follows, as templates of reasoning models do.
REWRITING_TEMPLATE = TEMPLATE.replace("<sep>", "<sep>{% if messages|length == 1 %}think{% endif %}")


def char_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character; ``<end>`` ends a turn and is not eos, as in Gemma's template."""
    special = ["<pad>", "<unk>", "<bos>", "<eos>", "<sep>", "<end>"]
    vocab = {token: i for i, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=["<sep>", "<end>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    return char_tokenizer()


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    return char_tokenizer(TEMPLATE)


@pytest.fixture
def rewriting() -> PreTrainedTokenizerFast:
    return char_tokenizer(REWRITING_TEMPLATE)
