"""A tiny base, three tasks in its bank, and what each task's merged checkpoint answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bank.samples import make_delta
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_dist import Delta, DeltaBank, shard
from trace_dist.bank.bank import BASE
from trace_dist.bank.delta import applied
from trace_dist.bank.representation import represent
from trace_dist.bank.signature import Signature, fit_signature
from trace_dist.config import TinyConfig
from trace_dist.data import encode_prompt, pad_id, stop_ids
from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.tiny import build_tiny
from trace_dist.models.tokenizer import char_tokenizer

TASKS = ("copy", "twist", "plain", "later")
"""The last one is not in the bank at first."""
MORE = ("fold", "graze", "hoist", "lift", "mend")
"""Further ones, for a bank of eight."""
CAP = 8
TINY = TinyConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)


def prompts(task: str, num: int = 40, seed: int = 0) -> list[str]:
    generator = random.Random(f"{task} {seed}")
    return [f"{task} {''.join(generator.choices('abcdef', k=4))}" for _ in range(num)]


@dataclass(frozen=True)
class Small:
    """Where base, bank and merged checkpoints lie."""

    folder: Path
    known: dict[tuple[str, str, int], str] = field(default_factory=dict)
    """Answers that were asked for before."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def bank(self) -> Path:
        return self.folder / "bank"

    def parts(self, task: str) -> tuple[Signature, Delta | None]:
        """What the bank keeps of a task."""
        model = shard(AutoModelForCausalLM.from_pretrained(self.base))
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        ids = encode_prompt(prompts(task), tokenizer)
        x = represent(model.module, ids, layer=0, batch_size=40, pad_id=pad_id(tokenizer))
        if task == BASE:
            return fit_signature(x, 1, 0, BASE), None
        delta = make_delta(model, task, seed=(*TASKS, *MORE).index(task))
        mask = delta.mask.with_meta(model=fingerprint(self.base))
        # Large enough that each task answers otherwise.
        return fit_signature(x, 1, 0, task), Delta(mask, delta.values, task)

    def expected(self, task: str, asked: list[str], cap: int = CAP) -> list[str]:
        """What ``generate(do_sample=False)`` of the merged checkpoint writes, prompt by prompt."""
        new = [text for text in asked if (task, text, cap) not in self.known]
        if new:
            self.known.update(
                zip([(task, text, cap) for text in new], self._written(task, new, cap), strict=True)
            )
        return [self.known[task, text, cap] for text in asked]

    def _written(self, task: str, asked: list[str], cap: int) -> list[str]:
        model: Any = AutoModelForCausalLM.from_pretrained(self.base if task == BASE else self.folder / task)
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        texts = []
        for ids in encode_prompt(asked, tokenizer):
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=cap,
                eos_token_id=stop_ids(tokenizer),
            )
            texts.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
        return texts


def make(folder: Path, more: tuple[str, ...] = ()) -> Small:
    """A base, its bank of three tasks and more, and merged checkpoints beside it."""
    small = Small(folder)
    asked = {task: prompts(task) for task in (*TASKS, *more, BASE)}
    tokenizer = char_tokenizer(asked, ["abcdef"])
    model = build_tiny(TINY, len(tokenizer), seed=0)
    # Weights that are large enough for greedy decoding to visit many tokens.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.6, generator=generator)
    model.save_pretrained(small.base)
    tokenizer.save_pretrained(small.base)
    bank = DeltaBank.create(small.bank, fingerprint(small.base), layer=0)
    for task in (BASE, *TASKS, *more):
        signature, delta = small.parts(task)
        if task != "later":
            bank.add(signature, delta)
        if delta is not None:
            merged = shard(AutoModelForCausalLM.from_pretrained(small.base))
            with applied(merged, delta):
                merged.module.save_pretrained(folder / task)
    return small
