"""A tokenizer over characters for tiny models, made from the tasks themselves (no download).

Every character is a token, and so is each task's constant wording (the longest common prefix and suffix of
its prompts), which leaves prompts of a dozen tokens. A conversation is rendered as
``<bos>{user}<sep>{assistant}<eos>``; the generation prompt ends with ``<sep>``.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "sep_token": "<sep>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
_WORD = string.ascii_letters + string.digits
PAD_ID, BOS_ID, SEP_ID, EOS_ID, UNK_ID = range(len(SPECIAL_TOKENS))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ bos_token + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<sep>' }}{%- generation -%}{{ message['content'] + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ raise_exception('roles are user and assistant') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<sep>' }}{%- endif -%}"
)


def common_affixes(prompts: Sequence[str]) -> tuple[str, str]:
    """Constant wording before and after the part in which prompts differ; either may be empty.

    Cut to whole words, so that words which happen to begin (or end) with the same letters stay whole.
    """
    prefix = _common_prefix(prompts)
    suffix = _common_prefix([prompt[len(prefix) :][::-1] for prompt in prompts])[::-1]
    return prefix.rstrip(_WORD), suffix.lstrip(_WORD)


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # the extremes of the lexical order share only what all share
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, min(len(first), len(last)))]


def char_tokenizer(prompts_by_task: dict[str, list[str]], answers: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Token ids: the special tokens (0 to 4: pad, bos, sep, eos, unk), the characters in code-point order
    (printable ASCII and every character seen), then the tasks' prefixes and suffixes, of which the longest
    that matches wins. Decoding gives back the text exactly. Padding is on the left, for generation.

    Args:
        prompts_by_task: some prompts of each task; more make the constant wording more certain.
        answers: answers of all tasks, for their characters.

    Raises:
        ValueError: no prompts at all.
    """
    if not any(prompts_by_task.values()):
        raise ValueError(
            f"prompts_by_task={prompts_by_task!r}: holds no prompt; give at least one task with prompts"
        )
    texts = [prompt for prompts in prompts_by_task.values() for prompt in prompts]
    # [:-2]: no vertical tab, no form feed.
    characters = sorted(set(string.printable[:-2]).union(*texts, *answers))
    wording = {affix for prompts in prompts_by_task.values() if prompts for affix in common_affixes(prompts)}
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS.values(), *characters))}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    # Fixed order, so that ids do not depend on hash seeds; single characters are tokens already.
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in sorted(wording) if len(text) > 1])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **SPECIAL_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
    )
