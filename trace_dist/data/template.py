"""Chat templates: what stands before an answer, and what ends it.

[Note: frame of an answer]
A template is rendered twice: with a user turn and its generation prompt, as for generation, and with a user turn and
an answer, as for training. The two need not agree. What follows is one prompt for both, so that what is trained as
the answer is what is generated and scored:

- The prompt is the generation prompt. Where the template writes more than that before an answer (an empty
  thinking block, a channel), the prompt takes it in; white space alone stays with the answer.
- Thinking is switched off where the template has a switch. A thinking block that is still open at the end of the
  prompt is closed: empty, or after the words with which the template begins it.
- A template that writes today's date is told one day, always the same.
- The answer ends with the first token of the template's vocabulary that follows it; any other text there is left out.

The turns of a conversation are rendered together. The answers of its earlier turns are found in that text, as the template
writes them there, and are trained too. Templates of reasoning models may leave out the thoughts of earlier turns.

Without a template a conversation is its texts one after the other: eos ends each answer, and an empty line stands between
other turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trace_dist.data.examples import Prompt, Turn, turns_of
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)

_MARK = "theanswergoeshere"
_ANSWER: Turn = {"role": "assistant", "content": _MARK}
_SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn thinking off: Qwen3, GLM and SmolLM3 read the first, DeepSeek and Kimi the second."""
_CURE = (
    "give the tokenizer a chat_template that takes these turns, "
    "or remove the template to train on plain prompts"
)
_DAY = datetime(2024, 7, 26)
"""Today, for templates that write the date: the day that Llama's own fall back to. With the true one, a run that goes on
tomorrow would train on other tokens, and prompts would be answered that were never trained."""
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
_OPENING = r"(<\|?|\[|◁)([\w:.-]*(?:think|thought|reason)[\w:.-]*)(\|?>|\]|▷)"
_OPEN = re.compile(_OPENING, re.IGNORECASE)
_OPEN_AT_START = re.compile(r"\s*" + _OPENING, re.IGNORECASE)


class Frame(NamedTuple):
    """Texts around an answer: all that stands before it, white space that belongs to it, and what ends it.

    ``earlier``: where the prompt holds answers of earlier turns, from and to; the end token follows or is left out.
    """

    prompt: str
    lead: str
    tail: str
    earlier: tuple[tuple[int, int], ...] = ()


def frames(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[Frame]:
    """The frame of each prompt's answer ([Note: frame of an answer]).

    Raises:
        ValueError: the template cannot be rendered, or does not write what the user says or what was answered before.
    """
    if not tokenizer.chat_template:
        return [_plain_frame(prompt, str(tokenizer.eos_token or "")) for prompt in prompts]
    if _generation_prompt(turns_of("a"), tokenizer) == _generation_prompt(turns_of("b"), tokenizer):
        raise ValueError(f"{_name(tokenizer)}: it writes the same text whatever the user says; {_CURE}")
    asked = [turns_of(prompt) for prompt in prompts]
    _check_system(asked, tokenizer)
    begun = _rendered(asked, tokenizer, add_generation_prompt=True)
    whole = _rendered([[*turns, _ANSWER] for turns in asked], tokenizer, add_generation_prompt=False)
    end_of = cache(lambda after: _end_of(after, tokenizer))  # a template ends nearly all answers alike
    return [
        _frame(turns, start, *_around(text), end_of, tokenizer)
        for turns, start, text in zip(asked, begun, whole, strict=True)
    ]


def end_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the template writes after an answer; None where it writes none."""
    (whole,) = _rendered([[*turns_of("user"), _ANSWER]], tokenizer, add_generation_prompt=False)
    return _end_of(_around(whole)[1], tokenizer)[1]


def without_thinking(text: str) -> str:
    """A text without the thinking block that it begins with; the text itself where nothing follows the block."""
    opening = _OPEN_AT_START.match(text)
    if opening is None:
        return text
    rest = text.partition(_closing(opening))[2]
    return rest if rest.strip() else text


def _plain_frame(prompt: Prompt, end: str) -> Frame:
    if isinstance(prompt, str):
        return Frame(prompt, "", "")
    written, gap, earlier = "", "", []
    for turn in prompt:
        if turn["role"] == "assistant":
            earlier.append((len(written), len(written) + len(turn["content"])))
            written, gap = written + turn["content"] + end, ""
        else:
            written, gap = written + gap + turn["content"], "\n\n"
    return Frame(written, "", "", tuple(earlier))


def _frame(
    turns: list[Turn],
    asked: str,
    before: str,
    after: str,
    end_of: Callable[[str], tuple[str, str | None]],
    tokenizer: PreTrainedTokenizerBase,
) -> Frame:
    """The frame of an answer to what the template writes as ``asked``; ``before`` and ``after`` is what it writes around one."""
    between, end = end_of(after)
    lead = before[len(asked) :] if before.startswith(asked) else ""
    if lead.strip():
        asked, lead = before, ""
    asked = _closed(asked, turns, tokenizer)
    tail = "" if end is None else end if between.strip() else between + end
    earlier = tuple(_earlier(turns, asked, lead, end, tokenizer))
    if _MARK in before:
        raise ValueError(
            f"{_name(tokenizer)}: it writes an answer twice, so that it cannot be trained; {_CURE}"
        )
    return Frame(asked, lead, tail, earlier)


def _closed(asked: str, turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt without an open thinking block: one that the template opens, and may begin, after the last turn is closed."""
    if not _OPEN.search(asked):
        return asked
    marked = [*turns[:-1], {**turns[-1], "content": _MARK}]
    written = _generation_prompt(marked, tokenizer).rpartition(_MARK)[2]
    tail = written if asked.endswith(written) else asked
    opening = next(reversed([*_OPEN.finditer(tail)]), None)
    if opening is None or _closing(opening) in tail[opening.end() :]:
        return asked
    if tail is asked and tail[opening.end() :].strip():
        return asked
    begun = bool(tail[opening.end() :].strip())
    gap = "\n" if asked.endswith("\n") or begun else "\n\n"
    return asked + gap + _closing(opening) + "\n\n"


def _earlier(
    turns: list[Turn], asked: str, lead: str, end: str | None, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, int]]:
    """Where a prompt holds earlier answers, each with its lead and with white space before its end token.

    The conversation is rendered with marks in place of the answers, to see what the template writes between them. Text between
    an answer and its end token is left out, so that such an end token is a place of its own.
    """
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not places:
        return
    marked = [
        {**turn, "content": f"{_MARK}{place}{_MARK}"} if place in places else turn
        for place, turn in enumerate(turns)
    ]
    first, *others = re.split(rf"{_MARK}(\d+){_MARK}", _generation_prompt(marked, tokenizer))
    position = len(first) if asked.startswith(first) else -1
    for place, number, gap in zip(places, others[::2], others[1::2], strict=False):
        stop = _stop_of(turns[place]["content"], gap, asked, position)
        if position < 0 or stop < 0 or number != str(place):
            break
        start = position - len(lead) if asked.endswith(lead, 0, position) else position
        between = gap.partition(end)[0] if end is not None and end in gap else ""
        yield start, stop + (0 if between.strip() else len(between))
        if between.strip():
            yield stop + len(between), stop + len(between)
        position = stop + len(gap)
    else:
        if len(others) == 2 * len(places):
            return
    raise ValueError(
        f"{_name(tokenizer)}: it does not write earlier answers as they are, so they cannot be trained; {_CURE}"
    )


def _stop_of(answer: str, gap: str, asked: str, position: int) -> int:
    """Where an answer ends that a template writes from ``position`` on and ``gap`` follows; -1 if nowhere."""
    for written in (answer, answer.strip()):
        if asked.startswith(written + gap, max(0, position)):
            return position + len(written)
    return asked.find(gap, max(0, position)) if gap else -1


def _closing(opening: re.Match[str]) -> str:
    """``<think>`` -> ``</think>``, ``[THINK]`` -> ``[/THINK]``, ``<|START_THINKING|>`` -> ``<|END_THINKING|>``."""
    left, name, right = opening.groups()
    ended = re.sub("begin|start", "end", re.sub("BEGIN|START", "END", name))
    return f"{left}{ended if ended != name else '/' + name}{right}"


def _end_of(after: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The first token of the vocabulary's added ones in what follows an answer, and the text before it."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {
        *tokenizer.all_special_tokens
    }
    found = [(after.index(token), -len(token), token) for token in tokens if token.strip() and token in after]
    if not found:
        return after, None
    place, _, token = min(found)
    return after[:place], token


def _generation_prompt(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    return _rendered([turns], tokenizer, add_generation_prompt=True)[0]


def _around(whole: str) -> tuple[str, str]:
    """What a template writes before and after an answer; nothing where it does not write the answer at all."""
    before, found, after = whole.rpartition(_MARK)
    return (before, after) if found else ("", "")


def _rendered(
    conversations: Sequence[list[Turn]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> list[str]:
    if not conversations:
        return []
    try:
        return [
            str(text)
            for text in tokenizer.apply_chat_template(
                list(conversations),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **_told(tokenizer.get_chat_template()),
            )
        ]
    # A template is a program of its own: jinja's errors, and any that Python raises in its expressions.
    except Exception as error:
        if len(conversations) > 1:  # to name the turns of the one that fails
            return [
                text
                for turns in conversations
                for text in _rendered([turns], tokenizer, add_generation_prompt=add_generation_prompt)
            ]
        line = getattr(error, "lineno", None)
        where = f"line {line}: " if line else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        roles = " and ".join(dict.fromkeys(" ".join(str(turn["role"]).split()) for turn in conversations[0]))
        raise ValueError(
            f"{_name(tokenizer)}: it cannot be rendered for {roles:.200} turns ({where}{reason}); {_CURE}"
        ) from error


@cache
def _told(template: str) -> dict[str, Any]:
    """What a template is told: its switches for thinking, and the day, which replaces it by one that knows the day."""
    switches: dict[str, Any] = {name: False for name in _SWITCHES if re.search(rf"\b{name}\b", template)}
    dated = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), template)
    return switches if dated == template else {**switches, "chat_template": dated}


def _check_system(conversations: Sequence[list[Turn]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn where the template leaves out what the system says, as looked at in the first conversation where it says something."""
    for turns in conversations:
        places = [turn["role"] == "system" and bool(turn["content"].strip()) for turn in turns]
        if any(places):
            marked = [
                {**turn, "content": _MARK} if told else turn for turn, told in zip(turns, places, strict=True)
            ]
            if _generation_prompt(marked, tokenizer).lower().count(_MARK) < sum(places):
                _say_left_out(_name(tokenizer))
            return


@cache
def _say_left_out(name: str) -> None:
    logger.warning(
        "%s: it leaves out what the system says, in training and in answers; put it into the user's turn, or give the tokenizer "
        "a chat_template that writes it",
        name,
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"chat template of the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"
