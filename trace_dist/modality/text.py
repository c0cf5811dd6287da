"""``text``: prompts and answers of a causal LM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor, nn

from trace_dist.bank.representation import represent_views
from trace_dist.config import DataConfig, EvalConfig, MaskConfig
from trace_dist.config.bank import Pooling
from trace_dist.data.encoding import encode, encode_prompt, pad_id
from trace_dist.data.tasks import Task
from trace_dist.evaluation.lengths import tokens_needed
from trace_dist.models.loading import load_tokenizer as load_reader

__all__ = [
    "always", "batching", "check_size", "encode", "keeps_prompts", "load_reader", "lora", "poolings", "represent",
]  # fmt: skip

keeps_prompts = True
poolings = get_args(Pooling)


def batching(reader: Any) -> dict[str, Any]:
    """The loss is that of text anyway."""
    return {"pad_id": pad_id(reader)}


def check_size(
    task: Task,
    reader: Any,
    role: str,
    context: int | None,
    scored: bool,
    data: DataConfig,
    evaluation: EvalConfig,
) -> None:
    """Raise ValueError where an example, with what is generated for it, is longer than the context."""
    longest = max(map(len, encode(task.train, reader, data)["input_ids"][:]))
    parts = [("training", longest)]
    if scored:
        parts.append(("test", tokens_needed(reader, task, evaluation, data)))
        if task.validation is not None:
            looked_at = replace(task, test=task.validation)
            parts.append(("validation", tokens_needed(reader, looked_at, evaluation, data)))
            read = encode(task.validation, reader, data)["input_ids"][:]
            parts.append(("validation", max(map(len, read))))
    for part, needed in parts:
        if context is not None and needed > context:
            raise ValueError(
                f"a {part} example needs {needed} tokens, prompt and answer together, but the {role} has "
                f"{context} positions (max_position_embeddings); set data.max_length to at most "
                f"{context} with data.truncate_prompt=true, lower eval.max_new_tokens, or drop the example"
            )


def encoded(prompts: Sequence[Any], reader: Any, data: DataConfig) -> list[list[int]]:
    """Token ids of prompts, cut as the configuration says."""
    return encode_prompt(list(prompts), reader, data.max_length if data.truncate_prompt else None)


def represent(
    model: Any,
    prompts: Sequence[Any],
    reader: Any,
    data: DataConfig,
    *,
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    batch_size: int,
) -> dict[Pooling, Tensor]:
    """As ``bank.representation``."""
    ids = encoded(prompts, reader, data)
    return represent_views(
        model, ids, layers=layers, poolings=poolings, batch_size=batch_size, pad_id=pad_id(reader)
    )


def always(module: nn.Module, task: Task, mask: MaskConfig) -> Mapping[str, Tensor]:
    """Nothing: all tasks answer by one output head."""
    return {}


def lora(module: nn.Module) -> dict[str, Any]:
    """Every linear layer but the output head."""
    return {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
