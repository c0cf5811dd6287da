"""Sharded models: one interface, several backends."""

from trace_dist.sharding.base import PartitionView, Shard, ShardedModel
from trace_dist.sharding.build import load_sharded, shard
from trace_dist.sharding.single import ReplicatedModel

__all__ = ["PartitionView", "ReplicatedModel", "Shard", "ShardedModel", "load_sharded", "shard"]
