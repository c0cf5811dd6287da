"""One answer while it is written: its tokens, its text as far as it is certain, and why it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

Finish = Literal["stop", "length", "cancelled"]
Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""
INCOMPLETE = "\ufffd"
"""What bytes decode to that are not yet a character."""


class Row:
    """One answer while it is written.

    Text is handed on as soon as later tokens cannot change it: when its last bytes are a whole character, and its end is not the
    beginning of a stop text. A token is read behind those before it, since some tokenizers write the first token of a text
    otherwise.

    Args:
        prompt: token ids.
        limit: tokens, at most.
        stops: texts before which it ends.
        ends: token ids that end it.
        decode: gives the text of tokens.
        on_text: takes the text piece by piece, where somebody listens.
    """

    def __init__(
        self,
        prompt: list[int],
        limit: int,
        stops: Sequence[str],
        ends: Collection[int],
        decode: Decode,
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        self.prompt, self.limit = prompt, limit
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._ends, self._stops, self._decode, self._on_text = ends, stops, decode, on_text
        self._text = ""
        self._sent = 0
        # Of the tokens: where the last piece of text began, and up to where the text is that of ``_text``.
        self._begin = self._read = 0

    def unwritten(self) -> Row:
        """The same row before its first token; nobody listens to it."""
        return Row(self.prompt, self.limit, self._stops, self._ends, self._decode)

    @property
    def text(self) -> str:
        """The answer so far; the whole of it when it has ended."""
        return self._text

    def cancel(self) -> None:
        """Nobody wants it any more; it ends with the next token."""
        if self.finish is None:
            self.finish = "cancelled"

    def add(self, token: int) -> None:
        """The next token; one that comes after the end is passed over."""
        if self.finish is not None:
            return
        if token in self._ends:
            self._end("stop")
            return
        self.tokens.append(token)
        if self._stops or self._on_text is not None:
            self._read_on()
        if self.finish is None and len(self.tokens) >= self.limit:
            self._end("length")

    def _read_on(self) -> None:
        before = self._decode(self.tokens[self._begin : self._read])
        now = self._decode(self.tokens[self._begin :])
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return
        seen = len(self._text)
        self._text += now[len(before) :]
        self._begin, self._read = self._read, len(self.tokens)
        if self._cut(seen):
            self.finish = "stop"
        self._send(0 if self.finish else self._held_back())

    def _end(self, why: Finish) -> None:
        self.finish = why
        # Decoded as a whole, as anybody would who has the tokens.
        self._text = self._decode(self.tokens)
        if self._cut(0):
            self.finish = "stop"
        self._send(0)

    def _cut(self, seen: int) -> bool:
        """Whether a stop text stands behind, or over, the first ``seen`` characters; the answer is cut before the first one."""
        longest = max(map(len, self._stops), default=0)
        begin = max(0, seen - longest + 1)
        found = [at for stop in self._stops if (at := self._text.find(stop, begin)) >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        return max(map(self._begun, self._stops), default=0)

    def _begun(self, stop: str) -> int:
        """How much of a stop text, but not all of it, stands at the end of what was not handed on; stop texts may be huge."""
        most = min(len(stop) - 1, len(self._text) - self._sent)
        return next((length for length in range(most, 0, -1) if self._text.endswith(stop[:length])), 0)

    def _send(self, held_back: int) -> None:
        piece = self._text[self._sent : len(self._text) - held_back]
        if piece and self._on_text is not None:
            self._sent += len(piece)
            self._on_text(piece)
