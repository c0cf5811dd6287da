"""Checkpoints of training: whole or absent, checked before anything of them is loaded."""

from trace_dist.checkpoint.background import Background
from trace_dist.checkpoint.dense import load_best_dense, load_dense, save_dense
from trace_dist.checkpoint.masked import check_mask, load_best, load_checkpoint, load_mask, save_checkpoint
from trace_dist.checkpoint.retention import latest_checkpoint
from trace_dist.checkpoint.writer import Write, write_checkpoint

__all__ = [
    "Background",
    "Write",
    "check_mask",
    "latest_checkpoint",
    "load_best",
    "load_best_dense",
    "load_checkpoint",
    "load_dense",
    "load_mask",
    "save_checkpoint",
    "save_dense",
    "write_checkpoint",
]
