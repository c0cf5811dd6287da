"""Gather of single elements whose places are kept as gaps, decoded on the way and never written to memory.

    i(w) = words[0] + ... + words[w]                        # index of what word w leads to
    p(w) = words in [0, w] that end an index, less one      # its place
    out[p(w)] = scale * src[i(w)]                           for every word that ends an index

A word ends an index unless it is the largest of its type, which says that the gap goes on (trace_dist, [Note: gaps]). Both sums
are begun at the *start* of a word's chunk, which `chunk_starts` computes once for a mask. A gradient is then read with a byte an
entry, where decoding first would write and read 8 bytes of indices an entry, several times over. The values have the bits of
`compact_gather`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import FLOATS, TILE, BenchCase, Impl, launch, use_triton

WORDS = (torch.uint8, torch.int16, torch.int32)


def gap_gather_ref(src: Tensor, words: Tensor, scale: float = 1.0) -> Tensor:
    """Gather by explicit indices: fp32, or fp64 for an fp64 ``src``."""
    indices = words.cumsum(0, dtype=torch.int64)[words != torch.iinfo(words.dtype).max]
    return src[indices].to(_out_dtype(src)) * scale


def chunk_starts(words: Tensor) -> Tensor:
    """The two sums before each chunk of `TILE` words: [chunks, 2] int64, on the device of the words.

    Args:
        words: [num_words] uint8, int16 or int32 gaps.
    """
    num_chunks = triton.cdiv(words.numel(), TILE)
    padded = torch.nn.functional.pad(words, (0, num_chunks * TILE - words.numel())).view(num_chunks, TILE)
    ends = (padded != torch.iinfo(words.dtype).max).sum(1)  # in the last chunk some too many; none reads that
    sums = torch.stack([padded.sum(1, dtype=torch.int64), ends], dim=1)
    return sums.cumsum(0) - sums


@triton.jit
def _gap_gather_kernel(  # type: ignore[no-untyped-def]
    src_ptr,
    words_ptr,
    starts_ptr,
    out_ptr,
    scale,
    num_words,
    LARGEST: tl.constexpr,
    WORDS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    at = pid * WORDS + tl.arange(0, WORDS)
    valid = at < num_words
    word = tl.load(words_ptr + at, mask=valid, other=0)
    # The sum of a chunk of short words fits 32 bits.
    word = word.to(tl.int64) if LARGEST > 32767 else word.to(tl.int32)
    ends = valid & (word != LARGEST)
    index = tl.load(starts_ptr + 2 * pid) + tl.cumsum(word, 0)
    place = tl.load(starts_ptr + 2 * pid + 1) + tl.cumsum(ends.to(tl.int32), 0) - 1
    value = tl.load(src_ptr + index, mask=ends, other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + place, value, mask=ends)


def gap_gather(
    src: Tensor, words: Tensor, starts: Tensor, num_entries: int, *, scale: float = 1.0, impl: Impl = "auto"
) -> Tensor:
    """Picks single elements out of a whole parameter.

    Args:
        src: [numel] bf16, fp16, fp32 or fp64, contiguous.
        words: [num_words] uint8, int16 or int32 gaps of the entries; the last one lies below ``numel``.
        starts: `chunk_starts` of the words.
        num_entries: how many entries there are.
        scale: factor on ``src``.
        impl: see dispatch.py; there is no C++ path.

    Returns:
        [num_entries] fp32, fp64 for an fp64 ``src``.
    """
    if src.dim() != 1 or not src.is_contiguous() or src.dtype not in FLOATS:
        raise ValueError(
            f"src: {src.dtype} of shape {tuple(src.shape)}, must be a contiguous vector of floats; flatten it"
        )
    if words.dim() != 1 or words.dtype not in WORDS:
        raise ValueError(f"words: {words.dtype} of shape {tuple(words.shape)}, must be 1-D gaps; encode them")
    num_chunks = triton.cdiv(words.numel(), TILE)
    if starts.shape != (num_chunks, 2):
        raise ValueError(
            f"starts: shape {tuple(starts.shape)}, must be ({num_chunks}, 2); pass chunk_starts(words)"
        )
    if not use_triton(impl, src, words, starts):
        return gap_gather_ref(src, words, scale)
    out = src.new_empty(num_entries, dtype=torch.float32)
    largest = torch.iinfo(words.dtype).max
    if num_chunks:
        args = (src, words, starts, out, float(scale), words.numel())
        launch(_gap_gather_kernel, num_chunks, src.device, *args, LARGEST=largest, WORDS=TILE)
    return out


def bench_case(numel: int, density: float, block: int, dtype: torch.dtype, device: str) -> BenchCase:
    """Gather of random single elements; ``block`` plays no part."""
    chosen = torch.rand(numel, device=device) < density
    gaps = chosen.nonzero().view(-1).diff(prepend=torch.zeros(1, dtype=torch.int64, device=device))
    words = gaps.to(torch.int16)  # wide enough for any density that is worth a mask
    starts, src = chunk_starts(words), torch.randn(numel, device=device).to(dtype)
    num_bytes = words.numel() * (words.element_size() + src.element_size() + 4) + starts.nbytes
    return BenchCase(lambda: gap_gather(src, words, starts, words.numel()), num_bytes)


def _out_dtype(src: Tensor) -> torch.dtype:
    return torch.float64 if src.dtype == torch.float64 else torch.float32
