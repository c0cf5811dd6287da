"""Chat templates of the kinds that people use, each with the text that stands before an answer and what ends it."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|start|>", "<|end|>", "[THINK]", "[/THINK]"]


class Kind(NamedTuple):
    template: str
    before: str
    after: str


def _template(user: str, answer: str, generation: str) -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}"
        + user
        + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + generation + "{% endif %}"
    )


_USER = "<|start|>user\n{{ m['content'] }}<|end|>\n"
_ASKED = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
_PLAIN = "<|start|>assistant\n{{ m['content'] }}<|end|>\n"
_BLOCK = "<|start|>assistant\n<think>\n\n</think>\n\n{{ m['content'] }}<|end|>\n"
_SWITCH = (
    "<|start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
_EMPTY = _ASKED + "<think>\n\n</think>\n\n"

KINDS = {
    "no_thinking": Kind(_template(_USER, _PLAIN, "<|start|>assistant\n"), _ASKED, "<|end|>"),
    "hybrid": Kind(_template(_USER, _BLOCK, _SWITCH), _EMPTY, "<|end|>"),
    "hybrid_without_block_in_history": Kind(_template(_USER, _PLAIN, _SWITCH), _EMPTY, "<|end|>"),
    "hybrid_without_switch": Kind(_template(_USER, _BLOCK, "<|start|>assistant\n"), _EMPTY, "<|end|>"),
    "opens_block": Kind(_template(_USER, _BLOCK, "{{ '<|start|>assistant\n<think>\n' }}"), _EMPTY, "<|end|>"),
    "opens_block_history_has_none": Kind(
        _template(_USER, _PLAIN, "{{ '<|start|>assistant\n<think>\n' }}"), _EMPTY, "<|end|>"
    ),
    "opens_block_without_newline": Kind(
        _template(
            _USER,
            "<|start|>assistant\n{{ m['content'].split('</think>')[-1] }}<|end|>\n",
            "<|start|>assistant\n<think>",
        ),
        _EMPTY,
        "<|end|>",
    ),
    "bracket_markers": Kind(
        _template("[INST]{{ m['content'] }}[/INST]", "{{ m['content'] }}<eos>", "[THINK]"),
        "[INST]hi[/INST][THINK]\n\n[/THINK]\n\n",
        "<eos>",
    ),
    "cohere_markers": Kind(
        _template(_USER, _PLAIN, "<|start|>assistant\n<|START_THINKING|>"),
        _ASKED + "<|START_THINKING|>\n\n<|END_THINKING|>\n\n",
        "<|end|>",
    ),
    "channels": Kind(
        _template(
            "<|start|>user<|message|>{{ m['content'] }}<|end|>",
            "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<eos>",
            "<|start|>assistant",
        ),
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>",
        "<eos>",
    ),
    "deepseek_switch": Kind(
        _template(
            _USER, "<|start|>assistant\n</think>{{ m['content'] }}<eos>",
            "<|start|>assistant\n{% if thinking %}<think>{% else %}</think>{% endif %}",
        ),
        _ASKED + "</think>",
        "<eos>",
    ),
    "space_before_answer": Kind(
        _template("<bos>[INST] {{ m['content'] }} [/INST]", " {{ m['content'] }} <eos>", ""),
        "<bos>[INST] hi [/INST]",
        " <eos>",
    ),
    "newline_before_answer": Kind(
        _template("user: {{ m['content'] }}\n\n", "assistant:\n{{ m['content'] }}<eos>", "assistant:"),
        "user: hi\n\nassistant:",
        "<eos>",
    ),
    "no_generation_prompt": Kind(
        _template("<|start|>user {{ m['content'] }}<|end|>", "<|start|>bot {{ m['content'] }}<|end|>", ""),
        "<|start|>user hi<|end|><|start|>bot ",
        "<|end|>",
    ),
    "other_generation_prompt": Kind(
        _template(_USER, _PLAIN, "<|start|>model\n"), "<|start|>user\nhi<|end|>\n<|start|>model\n", "<|end|>"
    ),
    "text_after_answer": Kind(
        _template("Q: {{ m['content'] }}\n", "A: {{ m['content'] }}\n### END\n", "A: "), "Q: hi\nA: ", "<eos>"
    ),
    "text_before_end": Kind(
        _template("Q: {{ m['content'] }}\n", "A: {{ m['content'] }} (done)<|end|>", "A: "), "Q: hi\nA: ", "<|end|>"
    ),
    "upper_case": Kind(
        _template(_USER, "<|start|>assistant\n{{ m['content'] | upper }}<|end|>\n", "<|start|>assistant\n"),
        _ASKED,
        "<eos>",
    ),
}  # fmt: skip


def bpe_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE; the markers of a thinking block are added but not special tokens, as in Qwen3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator(["what is two plus two four user assistant\n\nhi"] * 3, trainer)
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer
