"""Drop-in parts are found lazily, by name or by path, and their options are checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trace_dist.utils.registry import Registry

PART = '''
"""A part."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    """Options."""
    lr: float = 1e-3
    """Learning rate."""
    rank: int | None = None
    """Rank."""
'''


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    (tmp_path / "trace_part_module.py").write_text(PART)
    (tmp_path / "trace_bare_module.py").write_text('"""No options."""\n')
    package = tmp_path / "trace_own"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Registry("x.kind", {"part": "trace_part_module", "bare": "trace_bare_module"})


def test_nothing_is_imported_before_a_part_is_used(registry: Registry) -> None:
    sys.modules.pop("trace_part_module", None)
    registry.check("part")
    assert list(registry) == ["part", "bare"]
    assert "trace_part_module" not in sys.modules
    registry.load("part")
    assert "trace_part_module" in sys.modules


def test_options_are_read_and_have_defaults(registry: Registry) -> None:
    assert registry.options("part").lr == 1e-3
    assert registry.options("part", {"lr": "3e-4", "rank": 4}).lr == 3e-4
    assert registry.options("bare") is None


def test_a_part_may_lie_outside_the_package(registry: Registry) -> None:
    assert registry.options("trace_own.part", {"rank": 2}).rank == 2


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("nothing", {}, "x.kind='nothing': there is no such part; choose among part, bare"),
        ("no.such.module", {}, "cannot be imported"),
        ("part", {"speed": 1}, "'speed' is not an option; its options are lr, rank"),
        ("bare", {"speed": 1}, "it has no options"),
        ("part", {"lr": "fast"}, "x.kind 'part'"),
    ],
)
def test_a_mistake_is_one_line(registry: Registry, name: str, values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("'", ".").replace("(", ".")) as caught:
        registry.options(name, values)
    assert "\n" not in str(caught.value)
