"""Tasks: prompt/answer examples from any source, tokenised, in batches that resume exactly."""

from trace_dist.data.batches import Batches, Step
from trace_dist.data.encoding import (
    IGNORE,
    Pair,
    check_context,
    context_length,
    encode,
    encode_pairs,
    encode_prompt,
    pad_id,
    stop_ids,
)
from trace_dist.data.examples import Example, Prompt
from trace_dist.data.sources import Splits, load_examples
from trace_dist.data.tasks import Task, load_task

__all__ = [
    "IGNORE",
    "Batches",
    "Example",
    "Pair",
    "Prompt",
    "Splits",
    "Step",
    "Task",
    "check_context",
    "context_length",
    "encode",
    "encode_pairs",
    "encode_prompt",
    "load_examples",
    "load_task",
    "pad_id",
    "stop_ids",
]
