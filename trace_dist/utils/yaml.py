"""YAML from outside: what would take for ever or too deep to read is refused at once."""

from __future__ import annotations

from typing import Any

import yaml

MOST_DEEP = 50
"""Levels of nesting that a document may have; the configuration needs five."""
MOST_NODES = 100_000
"""Values that a document may have, with every alias written out."""


def check_yaml(text: str) -> None:
    """Refuse a document that is nested too deeply or grows beyond measure through its aliases.

    Raises:
        yaml.YAMLError: it is one of these, or no YAML.
    """
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_nodes.append((event.anchor, total))
            total += 1
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise yaml.YAMLError(f"the node &{event.anchor} holds itself")
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
        if len(open_nodes) > MOST_DEEP:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEEP} levels deep")
        if total > MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {MOST_NODES} values once its aliases are written out")


def load_yaml(text: str) -> Any:
    """A document in plain types.

    Raises:
        yaml.YAMLError: as ``check_yaml``.
    """
    check_yaml(text)
    return yaml.safe_load(text)
