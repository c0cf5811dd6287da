"""A file that is no configuration, or whose numbers are not what they look like, is named, with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from trace_dist.cli.parser import parse

START = "target: {path: m}\nseed: SEED\ntasks:\n  - {name: a, path: a.jsonl}\n"


def parsed(content: bytes, folder: Path) -> int:
    path = folder / "config.yaml"
    path.write_bytes(content)
    return int(parse(["run", "--config", str(path)])["run"].seed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; write for example target: {path: MODEL}"),
        (b"# nothing yet\n", "is empty; write for example"),
        (b"- a\n- b\n", "holds no keys and values; write for example"),
        (START.encode("utf-16"), "is not written in UTF-8; save it in UTF-8"),
        (START.replace("m}", "m\u00fcller}").encode("latin-1"), "is not written in UTF-8; save it in UTF-8"),
        (
            b"target: {path: m\n",
            "line 2: while parsing a flow mapping that begins in line 1, expected ',' or '}'",
        ),
        (b"target:\n\tpath: m\n", "line 2: while scanning for the next token, found character '\\t'"),
        (b"seed: 1\nseed: 2\n", "line 2: the key 'seed' is there twice; keep one"),
    ],
)
def test_no_configuration(content: bytes, said: str, tmp_path: Path) -> None:
    """It was the error of a decoder without a file, or `Unexpected config`."""
    with pytest.raises(ValueError, match="config=") as error:
        parsed(content, tmp_path)
    assert f"config.yaml': {said}" in str(error.value)


@pytest.mark.parametrize(
    ("value", "number"), [("010", 8), ("0_17", 15), ("-007", -7), ("1:30", 90), ("00", 0)]
)
def test_a_number_that_is_another_one_than_it_looks_like(value: str, number: int, tmp_path: Path) -> None:
    """`steps: 0100` trained 64 steps."""
    with pytest.raises(ValueError, match=f"line 2: {value} is the number {number} in YAML; write that one"):
        parsed(START.replace("SEED", value).encode(), tmp_path)


@pytest.mark.parametrize(
    ("value", "number"), [("0", 0), ("10", 10), ("0x10", 16), ("1_000", 1000), ("3 # 007, 1:30", 3)]
)
def test_numbers_as_they_look(value: str, number: int, tmp_path: Path) -> None:
    content = (
        START.replace("SEED", value) + "run_dir: '007'\ngeneral:\n  - {name: '1:30', path: 007/b.jsonl}\n"
    )
    assert parsed(content.encode("utf-8-sig"), tmp_path) == number
