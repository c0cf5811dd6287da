"""Sharded models: one interface, several backends."""

from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import load_sharded, shard
from trace_dist.sharding.single import ReplicatedModel
from trace_dist.sharding.views import PartitionView

__all__ = ["PartitionView", "ReplicatedModel", "ShardedModel", "load_sharded", "shard"]
