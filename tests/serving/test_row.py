"""One answer while it is written: against the text of all its tokens, however characters and stop texts are cut."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_dist.serving.row import Row

END = 256
TEXTS = st.text(alphabet="ab é€😀", max_size=12)


def decode(ids: Sequence[int]) -> str:
    """Bytes as tokens: characters of several bytes are whole at their last token alone."""
    return bytes(ids).decode(errors="replace")


def written(text: str, stops: list[str], limit: int = 99, listen: bool = True) -> tuple[Row, list[str]]:
    pieces: list[str] = []
    row = Row([1], limit, stops, {END}, decode, pieces.append if listen else None)
    for token in [*text.encode(), END]:
        row.add(token)
    return row, pieces


@given(TEXTS, st.lists(st.text(alphabet="ab é€😀", min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop_text(text: str, stops: list[str]) -> None:
    row, pieces = written(text, stops)
    # The one that is whole first ends it; of several at once, the longest.
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    wanted = text[: min(places)[1]] if places else text
    assert row.text == "".join(pieces) == wanted
    assert row.finish == "stop"
    assert written(text, stops, listen=False)[0].text == wanted
    # Nothing is written behind the stop text but what completes it.
    if places:
        assert len(row.tokens) < len(text.encode()) + 1
        assert all(stop not in decode(row.tokens[:-1]) for stop in stops)


def test_a_stop_text_ends_the_row_with_its_last_token() -> None:
    row, pieces = written("abcde", ["cd"])
    assert (row.text, decode(row.tokens), row.finish) == ("ab", "abcd", "stop")
    assert pieces == ["a", "b"]


def test_pieces_come_at_once() -> None:
    assert written("ab", ["bx"])[1] == ["a", "b"]
    assert written("a€b", [])[1] == ["a", "€", "b"]


@pytest.mark.parametrize("listen", [True, False])
def test_a_stop_text_as_long_as_a_request_costs_nothing(listen: bool) -> None:
    """Looked for letter by letter, one of this length took seconds for each token, and everybody waited."""
    begin = time.process_time()
    row, pieces = written("a" * 9, ["a" * 500_000, "x" * 500_000], listen=listen)
    assert time.process_time() - begin < 5
    assert (row.text, pieces) == ("a" * 9, ["a" * 9] if listen else [])


@pytest.mark.parametrize("listen", [True, False])
def test_the_limit_cuts_through_a_character(listen: bool) -> None:
    row, pieces = written("a€", [], limit=2, listen=listen)
    assert (row.text, row.finish, len(row.tokens)) == ("a\ufffd", "length", 2)
    assert "".join(pieces) == (row.text if listen else "")


def test_a_cancelled_row_takes_nothing_more() -> None:
    row, _ = written("", [])
    assert row.text == ""
    row = Row([1], 9, [], {END}, decode)
    row.add(97)
    row.cancel()
    row.add(98)
    assert (row.finish, row.tokens) == ("cancelled", [97])
