"""Comments stand above the line that they explain."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("trace_dist", "kernels", "tests", "docs/examples")
LAYOUT = {
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
CLOSING = frozenset(")]},:")
LIKELY = re.compile(r"^[)\]},: \t]+#(?! fmt:)", re.MULTILINE)
FOR_TOOLS = ("# fmt:", "# noqa", "# type:")


def behind_brackets(source: str) -> list[int]:
    """Lines that hold closing brackets, a comment, and nothing else; comments that only a tool reads do not count."""
    if not LIKELY.search(source):  # most files: reading tokens takes a while
        return []
    lines: dict[int, list[tokenize.TokenInfo]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.setdefault(token.start[0], []).append(token)
    return [
        number
        for number, (*tokens, last) in lines.items()
        if tokens
        and last.type == tokenize.COMMENT
        and not last.string.startswith(FOR_TOOLS)
        and all(token.string in CLOSING for token in tokens)
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("f(\n    1,\n)  # why", [3]),
        ("f(\n    [\n        1,\n    ]  # why\n)", [4]),
        ("f([\n    1,\n])  # fmt: skip", []),
        ("# why\nf(\n    1,  # the first\n)", []),
        ("x = (1)  # why", []),
    ],
)
def test_they_are_found(source: str, found: list[int]) -> None:
    assert behind_brackets(source) == found


def test_no_comment_stands_behind_a_closing_bracket() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    lines = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number in behind_brackets(path.read_text(encoding="utf-8"))
    ]
    assert lines == []
