"""A tiny model and a tiny task for the tests of probing and projection, the same in every process."""

from __future__ import annotations

from typing import Any

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.config import ModelConfig, ProbeConfig, RunConfig, TaskConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.projection.placements.narrow import Options

VOCABULARY = 37
"""Of the tiny model; sizes are chosen so that nothing divides them."""
NARROW = Options(steps=4, lr=1e-2)


def make_model(hidden_size: int = 36, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of two layers in fp32, the same every time."""
    options = {
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 50,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(hidden_size=hidden_size, **options))


def make_task(num_examples: int = 60, length: int = 4, seed: int = 0) -> datasets.Dataset:
    """Reverse a few tokens; every third example has a shorter prompt, so that answer tokens are uneven."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_examples):
        size = length - (index % 3 == 0)
        prompt = torch.randint(2, VOCABULARY, (size,), generator=generator).tolist()
        answer = prompt[::-1]
        rows.append(
            {
                "input_ids": [*prompt, 1, *answer],
                "labels": [-100] * (size + 1) + answer,
                "num_answer_tokens": size,
            }
        )
    return datasets.Dataset.from_list(rows)


def make_batches(batch_size: int = 8, micro_batch_size: int = 8, **task: Any) -> Batches:
    """Batches of ``make_task``."""
    return Batches(
        make_task(**task), batch_size=batch_size, micro_batch_size=micro_batch_size, seed=0, pad_id=0
    )


def make_config(**train: Any) -> RunConfig:
    """A run of which only the sections probe and train are read."""
    model = ModelConfig(path="unused")
    return RunConfig(
        run_dir="unused",
        target=model,
        tasks=[TaskConfig(name="reverse", path="unused.jsonl")],
        probe=ProbeConfig(steps=5, batch_size=8, fisher_batches=2),
        train=TrainConfig(**{"micro_batch_size": 8, "warmup_steps": 2, **train}),
    )


def reference_gradients(model: LlamaForCausalLM, batches: Batches, num: int) -> list[dict[str, torch.Tensor]]:
    """Gradients of the mean loss per answer token of some global batches, by plain autograd in fp64."""
    exact = make_model_like(model)
    gradients = []
    for _ in range(num):
        step = next(batches)
        exact.zero_grad()
        for batch in step.micro_batches:
            labels = batch["labels"][:, 1:]
            logits = exact(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
            (-(chosen * (labels != -100)).sum() / step.num_answer_tokens).backward()
        gradients.append({name: p.grad.clone() for name, p in exact.named_parameters() if p.grad is not None})
    return gradients


def make_model_like(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """An independent copy in fp64."""
    copy = LlamaForCausalLM(model.config).double()
    copy.load_state_dict(model.state_dict())
    return copy.train()
