"""Single values of a row as text."""

from __future__ import annotations

import ast
import json
import math
from decimal import Decimal
from typing import Any

import numpy as np

from trace_dist.data.files import check_characters


def text(value: Any, where: str) -> str:
    """A text, or a number as text.

    Args:
        value: of a cell.
        where: begins an error.

    Raises:
        ValueError: it is neither, is infinite or NaN, or holds half of a character.
    """
    if isinstance(value, str):
        return check_characters(value, where)
    # As pandas writes a number that is missing.
    if isinstance(value, (float, np.floating)) and value != value:
        raise ValueError(f"{where}: NaN, where a value is missing; fill it in or drop the example")
    if isinstance(value, Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, (int, float, np.number)):
        # An integer may be too large for a float, but is always finite.
        if isinstance(value, (float, np.floating)) and not math.isfinite(value):
            raise ValueError(f"{where}: {value} is no number; write a text or drop the example")
        return str(value)
    raise ValueError(
        f"{where}: {value!r} is neither a string nor a number; convert it to text or drop the example"
    )


def listed(cell: str) -> Any:
    """What a cell of a CSV file holds that is no text: JSON, or Python's own writing, in which pandas writes a list.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(cell.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError("neither JSON nor a list as Python writes it") from None


def optional_text(value: Any, where: str) -> str:
    """As ``text``; nothing where there is no value."""
    return "" if value is None else text(value, where)
