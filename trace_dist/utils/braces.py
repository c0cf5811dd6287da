"""Texts with columns in braces: ``{question}\n{context}``."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter


def pieces(template: str) -> list[tuple[str, str | None]]:
    """Plain texts, each with the column that follows it; None at the end. ``{{`` and ``}}`` stand for braces.

    Raises:
        ValueError: a brace has no partner, a column no name, or more than a name stands in braces.
    """
    found = []
    for text, column, form, conversion in Formatter().parse(template):
        if column is not None and (not column.strip() or form or conversion):
            raise ValueError("braces hold the name of a column and nothing else")
        found.append((text, column))
    return found


def columns_of(template: str) -> list[str]:
    """The columns that a template names, each once. Raises ValueError as ``pieces`` does."""
    return list(dict.fromkeys(column for _, column in pieces(template) if column is not None))


def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with a text for each of its columns. Raises ValueError as ``pieces`` does."""
    return "".join(text + (values[column] if column is not None else "") for text, column in pieces(template))
