"""A few damaged copies of every file; ``make fuzz`` tries many."""

from __future__ import annotations

import pytest
from fuzz.cases import fuzz
from fuzz.reader import Reader
from fuzz.readers import READERS

CASES = 20


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damage_is_refused_in_one_line_or_harmless(reader: Reader) -> None:
    found = fuzz(reader, 0, CASES)
    assert found["failures"] == []
    assert found.get("read", 0) + found.get("refused", 0) == CASES
    assert reader.leaves_out or found["refused"] > 0
