"""Sharded models: one interface, several backends."""

from trace_dist.sharding.base import PartitionView, Shard, ShardedModel
from trace_dist.sharding.build import load_sharded, shard

__all__ = ["PartitionView", "Shard", "ShardedModel", "load_sharded", "shard"]
