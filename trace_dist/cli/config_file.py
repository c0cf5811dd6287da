"""The file of a configuration, before the parser reads it: what is wrong with the whole of it is said with its name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from trace_dist.utils.yaml import check_yaml

_OTHER_BASE = re.compile(r"[-+]?(?:0[0-7_]*[0-7][0-7_]*|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
"""What YAML 1.1 reads in base 8 (``010``) or in base 60 (``1:30``)."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def check_config_file(path: Path) -> None:
    """Refuse a file that is no configuration, whatever its keys are; one that is not there is left to the parser.

    Raises:
        ValueError: it is not UTF-8, no YAML, empty or no section, or a number in it is another one than it looks like.
    """
    if not path.is_file():
        return
    where = f"config={str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not written in UTF-8; save it in UTF-8") from None
    try:
        check_yaml(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {_said(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        what = "is empty" if root is None else "holds no keys and values"
        raise ValueError(
            f"{where}: {what}; write for example target: {{path: MODEL}}, or let trace-dist init write it"
        )
    for node in _values(root, set()):
        if node.style is None and node.tag in _NUMBERS and _OTHER_BASE.fullmatch(node.value):
            number = yaml.safe_load(node.value)
            raise ValueError(
                f"{where}: line {node.start_mark.line + 1}: {node.value} is the number {number} in YAML; write that one, or the "
                "one that is meant, and put a text in quotes"
            )


def _said(error: yaml.YAMLError) -> str:
    """Where YAML is broken, and how, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    begun, at = error.context_mark, error.problem_mark.line + 1
    inside = "" if error.context is None else f"{error.context}, "
    if begun is not None and inside.startswith("while") and begun.line + 1 != at:
        inside = f"{error.context} that begins in line {begun.line + 1}, "
    return f"line {at}: {inside}{error.problem}"


def _values(node: yaml.Node, seen: set[int]) -> Iterator[yaml.ScalarNode]:
    """Scalars that are no keys, each once however many aliases it has."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from _values(value, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _values(value, seen)
