"""Single values of a row as text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trace_dist.config import TaskConfig
from trace_dist.data import load_examples
from trace_dist.data.values import text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (10**400, "1" + "0" * 400),
        (-7, "-7"),
        (2.5, "2.5"),
        (np.int64(3), "3"),
        # As databases write prices into a parquet file.
        (Decimal("1.50"), "1.50"),
        (Decimal("1E+3"), "1000"),
    ],
)
def test_numbers_are_read_as_text(value: Any, written: str) -> None:
    assert text(value, "x") == written


@pytest.mark.parametrize("value", [float("inf"), -np.float32("inf"), float("nan"), Decimal("NaN")])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^x: .*drop the example$"):
        text(value, "x")


def test_a_huge_integer_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": 10**400 + i}) + "\n" for i in range(40)))
    splits = load_examples(TaskConfig(name="t", path=str(path)), seed=0)
    assert all(
        row["answer"] == str(10**400 + int(row["prompt"][1:])) for row in (*splits.train, *splits.test)
    )
