"""How a section checks its values: one clear error that names the field, its value, the rule and a cure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Literal

from trace_dist.utils.home import from_home

Rate = float | Literal["auto"]
"""A peak learning rate, or the one that wins the race (config/race.py)."""
AUTO: Final = "auto"
LIMIT = 2**63
"""Above all integers that torch takes."""


def check(ok: bool, name: str, value: object, rule: str, cure: str) -> None:
    """Raise ``ValueError`` unless a rule holds."""
    if not ok:
        raise ValueError(f"{name}={value!r}: {rule}; {cure}")


def check_ranks(world_size: int, size: int, field: str = "sequence_parallel") -> None:
    """Raise ``ValueError`` unless groups of ``size`` ranks make up all of them; ``field`` begins the message."""
    rule = f"must divide the {world_size} ranks of the job"
    check(world_size % size == 0, field, size, rule, "change one of the two")


@dataclass(frozen=True)
class Section:
    """Base of the frozen dataclasses of a configuration.

    Every number is finite, and nothing is null but where null has a meaning; then the section's own rules hold. A section
    with other sections as fields leaves their values to them.
    """

    section: ClassVar[str]
    """How errors call the section."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = self._called(field.name), getattr(self, field.name)
            optional = "None" in str(field.type)
            check(
                value is not None or optional, name, value, "must not be null", "give a value or leave it out"
            )
            for where, number in _numbers(value, name):
                if isinstance(number, float):
                    check(math.isfinite(number), where, number, "must be finite", "give a number")
                else:
                    check(
                        -LIMIT <= number < LIMIT, where, number, "must fit into 64 bits", "give a smaller one"
                    )
        self.check()

    @property
    def where(self) -> str:
        """What stands before the dot in the name of a field."""
        return self.section

    def _called(self, name: str) -> str:
        """How errors call a field."""
        return f"{self.where}.{name}".lstrip(".")

    def check(self) -> None:
        """Raise ``ValueError`` where a rule of the section does not hold."""

    def expand(self, *names: str) -> None:
        """Fields that hold a file or a folder, or None: ``~`` at their beginning is the user's home."""
        for name in names:
            value = getattr(self, name)
            if value is not None:
                try:
                    expanded = str(from_home(value)) if value.startswith("~") else value
                except ValueError as error:
                    raise ValueError(f"{self._called(name)}={error}") from None
                # Before anyone else has the object.
                object.__setattr__(self, name, expanded)

    def at_least(self, least: int, *names: str) -> None:
        """Fields that are not None are this or more."""
        for name in names:
            value = getattr(self, name)
            rule = f"must be at least {least}"
            check(value is None or value >= least, self._called(name), value, rule, "raise it")

    def positive(self, *names: str) -> None:
        """Fields that are not None are more than 0."""
        for name in names:
            value = getattr(self, name)
            check(value is None or value > 0, self._called(name), value, "must be positive", "raise it")

    def rates(self, *names: str) -> None:
        """Fields that are neither None nor ``auto`` are more than 0."""
        self.positive(*(name for name in names if getattr(self, name) != AUTO))


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float | int]]:
    """Every number of a field, with its name; lists and mappings are looked into."""
    if isinstance(value, (float, int)):
        yield where, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(each, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _numbers(each, f"{where}.{index}")
