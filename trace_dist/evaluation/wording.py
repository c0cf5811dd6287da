"""What is compared in exact match: the words that a model said, and those that training taught it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from trace_dist.data.encoding import stop_ids
from trace_dist.data.template import without_thinking

_UNDONE = (normalizers.Prepend, normalizers.Strip, normalizers.ByteLevel)
"""Steps of a normaliser that decoding undoes, or that outer white space does not show."""
_SPACE = "\u2581"
"""As which SentencePiece writes a space."""


@dataclass(frozen=True)
class Wording:
    """Reads decoded tokens and reference answers alike.

    Neither keeps special tokens, outer white space, or, where there is a chat template, a thinking block that it begins with.
    A reference ends where training and generation end: at the first end token that it holds. It is normalised as the tokenizer
    normalises what it reads (NFC, lower case, ...): tokens hold nothing else.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: list[str]
    special: list[str]
    steps: list[Any]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Wording:
        """Raises ValueError as ``stop_ids`` does."""
        stops = [str(tokenizer.convert_ids_to_tokens(stop)) for stop in stop_ids(tokenizer)]
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        return cls(tokenizer, stops, special, _steps(tokenizer))

    def said(self, ids: Sequence[int]) -> str:
        """The text of decoded tokens."""
        whole = self._decode(ids, skip_special_tokens=False)
        answer = self._answer(whole)
        # The markers of a thinking block may be special tokens, so it is cut before those are left out.
        return self._plain(answer) if answer != whole else self._decode(ids, skip_special_tokens=True).strip()

    def taught(self, reference: str) -> str:
        """The text of a reference answer."""
        for stop in self.stops:
            reference = reference.partition(stop)[0]
        return self._normalised(self._plain(self._answer(reference)))

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def _answer(self, text: str) -> str:
        return without_thinking(text) if self.tokenizer.chat_template else text

    def _plain(self, text: str) -> str:
        for token in self.special:
            text = text.replace(token, "")
        return text.strip()

    def _normalised(self, text: str) -> str:
        for step in self.steps:
            text = step.normalize_str(text)
        if any(isinstance(step, normalizers.Replace) for step in self.steps):
            text = text.replace(_SPACE, " ")
        return text.strip()


def _steps(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """The steps of the tokenizer's normaliser that decoding does not undo; none of a tokenizer that is not written in Rust."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole: Any = getattr(backend, "normalizer", None)
    if whole is None:
        return []
    steps = list(cast(Any, whole)) if isinstance(whole, normalizers.Sequence) else [whole]
    return [step for step in steps if not isinstance(step, _UNDONE)]
