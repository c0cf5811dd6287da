"""Gathering single elements by their gaps: the bits of decoding first, over chunks, escapes and every type of word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from trace_kernels import compact_gather, gap_gather, traffic
from trace_kernels.dispatch import TILE, Impl
from trace_kernels.gap_gather import chunk_starts, gap_gather_ref
from trace_kernels.runs import Runs


def encoded(units: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Gaps with escapes, one after another."""
    largest, words = torch.iinfo(dtype).max, []
    for gap in units.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist():
        words += [largest] * (gap // largest) + [gap % largest]
    return torch.tensor(words, dtype=dtype)


def some_units(numel: int, num: int) -> torch.Tensor:
    return torch.randperm(numel)[:num].sort().values


CASES = {
    "none": torch.empty(0, dtype=torch.int64),
    "first": torch.tensor([0]),
    "last": torch.tensor([99_999]),
    "all": torch.arange(3000),
    "one chunk": torch.arange(TILE) * 3,
    "one more": torch.arange(TILE + 1) * 3 + 1,
    "wide gaps": torch.tensor([254, 255, 510, 1020, 66_000, 99_990]),
    "many chunks": None,
}


@pytest.mark.parametrize("word", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("name", CASES)
def test_as_decoded_first(name: str, word: torch.dtype, impl: Impl, device: str) -> None:
    units = CASES[name] if CASES[name] is not None else some_units(100_000, 5_001)
    src = torch.randn(100_000, device=device).bfloat16()
    words = encoded(units, word).to(device)
    out = gap_gather(src, words, chunk_starts(words), len(units), scale=0.37, impl=impl)
    runs = Runs.whole(units.to(device, torch.int32), 1, len(src))
    assert torch.equal(out, compact_gather(src, runs, scale=0.37, impl=impl))
    assert torch.equal(out, gap_gather_ref(src, words, 0.37))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_values(dtype: torch.dtype, impl: Impl, device: str) -> None:
    units = some_units(4000, 1500)
    src = torch.randn(4000, device=device).to(dtype)
    words = encoded(units, torch.uint8).to(device)
    out = gap_gather(src, words, chunk_starts(words), len(units), impl=impl)
    assert out.dtype == torch.float32
    assert torch.equal(out, src[units.to(device)].float())


def test_float64_keeps_its_bits() -> None:
    src, units = torch.randn(400, dtype=torch.float64), some_units(400, 150)
    words = encoded(units, torch.uint8)
    assert torch.equal(gap_gather(src, words, chunk_starts(words), 150), src[units])


def test_starts_beyond_two_to_the_31() -> None:
    words = torch.full((4 * TILE,), 2**31 - 2, dtype=torch.int32)
    assert chunk_starts(words).tolist() == [[chunk * TILE * (2**31 - 2), chunk * TILE] for chunk in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moves_at_most_15_percent_more_than_it_must(dtype: torch.dtype) -> None:
    for density in (0.01, 0.05, 0.2):
        units = (torch.rand(1 << 20) < density).nonzero().view(-1)
        moved, least = traffic.gap_gather_bytes(encoded(units, torch.uint8), dtype)
        assert 1.0 <= moved / least <= 1.15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"src": a["src"].view(2, -1)}, "src: .*must be a contiguous vector"),
        (lambda a: a | {"words": a["words"].long()}, "words: torch.int64.*must be 1-D gaps"),
        (lambda a: a | {"starts": a["starts"][:0]}, r"starts: shape \(0, 2\), must be \(1, 2\)"),
    ],
)
def test_refuses(change: Callable[[dict], dict], message: str) -> None:
    words = torch.ones(5, dtype=torch.uint8)
    given = {"src": torch.ones(10), "words": words, "starts": chunk_starts(words), "num_entries": 5}
    with pytest.raises(ValueError, match=message):
        gap_gather(**change(given))
