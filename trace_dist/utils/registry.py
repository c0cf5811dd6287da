"""Lazy dictionaries of drop-in parts: methods, isolations, placements, scores, compositions, exporters.

[Note: drop-in parts] A part is one file plus one row ``name -> module path`` in the registry of its room. Its
label, its colour, its flags and its functions stand in that file, and so do its options: a frozen dataclass called
``Options``, whose field docstrings are their help. Nothing is imported before a part is used, so that the command
line answers at once. A name with a dot is the path of a module outside this package that holds a part of the same
kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Registry:
    """The parts of one kind.

    Attributes:
        field: the configuration field that names a part, for errors.
        homes: name -> path of the module that holds the part.
    """

    field: str
    homes: dict[str, str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __contains__(self, name: str) -> bool:
        return name in self.homes

    def check(self, name: str, field: str | None = None) -> None:
        """Raise ValueError unless a part has this name; imports nothing of this package. ``field`` begins the message instead."""
        if name not in self.homes and "." not in name:
            raise ValueError(
                f"{field or self.field}={name!r}: there is no such part; choose among {', '.join(self.homes)}, "
                "or give the path of a module of your own"
            )

    def load(self, name: str) -> ModuleType:
        """The module that holds a part.

        Raises:
            ValueError: no part has this name, or the module of that path cannot be imported.
        """
        self.check(name)
        try:
            return import_module(self.homes.get(name, name))
        except ModuleNotFoundError as error:
            if name in self.homes:
                raise
            raise ValueError(
                f"{self.field}={name!r}: cannot be imported ({error}); check the path and PYTHONPATH"
            ) from None

    def subclass(self, name: str, attribute: str, base: type[T]) -> type[T]:
        """The class that a part's module holds.

        Args:
            name: of the part.
            attribute: the class's name in the module.
            base: what it must be a subclass of.

        Raises:
            ValueError: as ``load``, or the module holds no such class.
        """
        kind = getattr(self.load(name), attribute, None)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise ValueError(
                f"{self.field}={name!r}: the module has no {attribute}, a subclass of {base.__module__}.{base.__qualname__}; "
                "name one that has"
            )
        return kind

    def options(self, name: str, values: Mapping[str, Any] | None = None) -> Any:
        """A part's ``Options`` from plain values, checked by type; None for a part without options.

        Raises:
            ValueError: an option that the part does not have, or a value of the wrong type.
        """
        kind = getattr(self.load(name), "Options", None)
        values = dict(values or {})
        known = [entry.name for entry in fields(kind)] if kind is not None and is_dataclass(kind) else []
        for key in values:
            if key not in known:
                rule = f"its options are {', '.join(known)}" if known else "it has no options"
                raise ValueError(f"{self.field} {name!r}: {key!r} is not an option; {rule}")
        return None if kind is None else instance(kind, values, f"{self.field} {name!r}")


def instance(kind: Any, values: dict[str, Any], what: str) -> Any:
    """A dataclass from plain values, as the configuration's parser reads them.

    Raises:
        ValueError: an unknown key, or a value of the wrong type; begins with ``what``.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, nested_key=None)
    try:
        return kind(**vars(parser.instantiate(parser.parse_object(values))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from None
