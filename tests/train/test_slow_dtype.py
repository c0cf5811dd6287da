"""A large model in a data type that this CPU only emulates is trained with a hint, any other one without."""

from __future__ import annotations

import pytest
import torch
from engine.resuming import PLAIN

from trace_dist import shard
from trace_dist.train import slow_dtype

FIELD = "target.dtype"


@pytest.mark.parametrize(
    ("dtype", "least", "times", "hinted"),
    [
        (torch.bfloat16, 1, 8.3, True),
        (torch.bfloat16, 1, 1.3, False),
        (torch.bfloat16, slow_dtype.LARGE, 8.3, False),
        (torch.float32, 1, 8.3, False),
    ],
)
def test_hint(
    dtype: torch.dtype,
    least: int,
    times: float,
    hinted: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(slow_dtype, "LARGE", least)
    monkeypatch.setattr(slow_dtype, "times_as_long", lambda _: times)
    slow_dtype.hint_at_slow_dtype(shard(PLAIN.model().to(dtype), "single"), FIELD)
    line = "target.dtype=bfloat16: this CPU takes about 8 times as long to multiply it as float32"
    assert [line in record.message for record in caplog.records] == [True] * hinted
    assert not hinted or caplog.messages[0].endswith("weights take 2 times the memory")


def test_the_times_are_measured() -> None:
    assert 0 < slow_dtype.times_as_long(torch.bfloat16) < float("inf")
