"""An answer that is read while it is written: the model works in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from trace_dist.serving.row import Row
from trace_dist.utils import dist


class Pieces:
    """Pieces of a text on their way from the thread that writes to the one that reads."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def add(self, piece: str) -> None:
        """The next piece."""
        self._waiting.put(piece)

    def end(self) -> None:
        """There is no other."""
        self._waiting.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._waiting.get, None)


class Stream:
    """The pieces of an answer. Who stops reading stops the writing, and the model is the base again.

    Args:
        row: the answer.
        pieces: takes its text.
        write: writes it; called in a thread.
        answer: makes the whole of it.
    """

    def __init__(
        self, row: Row, pieces: Pieces, write: Callable[[], None], answer: Callable[[], Any]
    ) -> None:
        self._row, self._pieces, self._write, self._answer = row, pieces, write, answer
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            dist.take_device()
            self._write()
        # Whatever it is, it is raised where somebody reads.
        except BaseException as error:
            self._error = error
        finally:
            self._pieces.end()

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self._pieces
        finally:
            self.close()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop writing, unless it is done."""
        self._row.cancel()
        self._thread.join()

    @property
    def answer(self) -> Any:
        """The whole answer, waited for. Raises what the writing raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._answer()
