"""Documents that would take for ever are refused at once; ordinary ones are read as ever."""

from __future__ import annotations

import pytest
import yaml

from trace_dist.utils.yaml import MOST_DEEP, MOST_NODES, check_yaml, dump_yaml, load_yaml


def test_ordinary_documents() -> None:
    assert load_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 1}") == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 1},
    }
    assert load_yaml("") is None
    nested = "[" * MOST_DEEP + "]" * MOST_DEEP
    assert isinstance(load_yaml(nested), list)


@pytest.mark.parametrize(
    "text", ["[" * 100000, "{a: " * 100000, "- " * 5000, "? " * 5000, "a: [" * 200 + "]" * 200]
)
def test_deep_documents(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match=f"more than {MOST_DEEP} levels"):
        check_yaml(text)


@pytest.mark.parametrize("width", [2, 9])
@pytest.mark.parametrize("kind", ["sequence", "mapping"])
def test_aliases_that_grow(kind: str, width: int) -> None:
    lines = ["k0: &k0 [a, b]"]
    for i in range(1, 60):
        inner = [f"*k{i - 1}"] * width
        body = ", ".join(inner if kind == "sequence" else [f"x{j}: {each} " for j, each in enumerate(inner)])
        lines.append(f"k{i}: &k{i} " + (f"[{body}]" if kind == "sequence" else f"{{{body}}}"))
    with pytest.raises(yaml.YAMLError, match=f"more than {MOST_NODES} values"):
        check_yaml("\n".join(lines))


def test_an_alias_within_its_own_anchor() -> None:
    """YAML allows it, and it has no end."""
    with pytest.raises(yaml.YAMLError, match="holds itself"):
        check_yaml("a: &a [*a, 1]")


def test_a_broken_document() -> None:
    with pytest.raises(yaml.YAMLError):
        check_yaml("{{{")


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\na: 3", "a: {b: 1, b: 2}", "- a: 1\n  a: 2", "a: {x: [1, {y: 2}], z: 3}\na: 1"]
)
def test_a_key_that_is_there_twice(text: str) -> None:
    """YAML's readers take the last one, without a word."""
    with pytest.raises(yaml.YAMLError, match=r"line \d: the key '[ab]' is there twice"):
        check_yaml(text)


def test_one_key_in_several_mappings() -> None:
    assert len(load_yaml("a: {b: 1}\nc: {b: a}\nd: [{b: 1}, {b: 1}]\ne: [b, b]\nb: a")) == 5


def test_what_is_written_is_read_by_other_readers() -> None:
    """YAML 1.2 and jsonargparse take ``1e3`` for a number, and PyYAML does not."""
    assert dump_yaml({"b": ["1e3", "1.5e3", "-2E5", "e3"], "a": 1e-5}) == (
        "b:\n- '1e3'\n- '1.5e3'\n- '-2E5'\n- e3\na: 1.0e-05\n"
    )
