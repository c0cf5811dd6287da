"""How exchanges are cut into buckets."""

from __future__ import annotations

from trace_dist.sharding.reduction import BUCKET_BYTES, MESSAGE_BYTES, bucket_bytes_for, cut_buckets


def test_buckets_are_filled_from_the_last_parameter() -> None:
    assert cut_buckets([3, 4, 5, 6], 10) == [[3], [2, 1], [0]]
    assert cut_buckets([20, 1], 10) == [[1], [0]]  # what is larger than a bucket has one of its own


def test_many_ranks_get_no_tiny_messages() -> None:
    assert bucket_bytes_for(1) == bucket_bytes_for(1024) == BUCKET_BYTES
    assert bucket_bytes_for(4096) == 4096 * MESSAGE_BYTES > BUCKET_BYTES
