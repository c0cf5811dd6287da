"""YAML from outside: what would take for ever or too deep to read is refused at once."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_DEEP = 50
"""Levels of nesting that a document may have; the configuration needs five."""
MOST_NODES = 100_000
"""Values that a document may have, with every alias written out."""
_WORD = re.compile(r"[\w.+/-]+")
"""A document of one value, as most that a command line is read from are."""


class _Keys:
    """The keys of a mapping so far, and whether the next node is one."""

    def __init__(self) -> None:
        self.seen, self.is_next = set[str](), True


def _look_at_keys(event: yaml.Event, keys: list[_Keys | None]) -> None:
    """Raise ``yaml.YAMLError`` where an event is a key that its mapping has already; ``keys`` of all open collections."""
    if isinstance(event, yaml.CollectionEndEvent):
        keys.pop()
        return
    inner = keys[-1] if keys else None
    if inner is not None:
        if inner.is_next and isinstance(event, yaml.ScalarEvent):
            if event.value in inner.seen:
                line = "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "
                raise yaml.YAMLError(f"{line}the key {event.value[:80]!r} is there twice; keep one")
            inner.seen.add(event.value)
        inner.is_next = not inner.is_next
    if isinstance(event, yaml.CollectionStartEvent):
        keys.append(_Keys() if isinstance(event, yaml.MappingStartEvent) else None)


def check_yaml(text: str) -> None:
    """Refuse a document that is nested too deeply, grows beyond measure through its aliases, or names a key twice.

    Raises:
        yaml.YAMLError: it is one of these, or no YAML.
    """
    if _WORD.fullmatch(text):
        return
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    keys: list[_Keys | None] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
            _look_at_keys(event, keys)
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


class _Dumper(yaml.SafeDumper):
    """Quotes texts that other readers of YAML take for numbers, such as ``1e3``."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def dump_yaml(value: Any, **options: Any) -> str:
    """A document of plain types; the program's own parser and ``load_yaml`` read the same of it.

    Args:
        value: what it says.
        options: as of ``yaml.dump``; keys stay in their order.
    """
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options))
