"""MaskedAdamW inside transformers' Trainer, which knows nothing of compact gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import torch
from engine.cases import CASES, batches
from transformers import Trainer, TrainingArguments, default_data_collator

from trace_dist import Mask, MaskedAdamW, shard

CASE = replace(CASES["element"], steps=8)
ROWS = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids, _ in batches(CASE)]


class InOrder(Trainer):
    """Takes the examples as they come."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(ROWS)


def make() -> MaskedAdamW:
    model = shard(CASE.model(), "single")
    mask = Mask.random(model, 0.3, "element", seed=1, maskable="all")
    return MaskedAdamW(model, mask, lr=1e-2, eps=1e-5, max_grad_norm=1.0)


def test_trainer_equals_a_plain_loop(tmp_path: Path) -> None:
    """With gradient accumulation; Trainer resets gradients by ``model.zero_grad()`` alone."""
    ours, theirs = make(), make()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        lr_scheduler_type="linear",
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOrder(
        model=ours.model.module,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        data_collator=default_data_collator,
        optimizers=(ours, None),
    )
    trainer.train()

    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 1 - step / 4)
    for step in range(4):
        for row in ROWS[2 * step : 2 * step + 2]:
            ids = torch.tensor([row["input_ids"]])
            theirs.model.backward(theirs.model(input_ids=ids, labels=ids).loss / 2)
        theirs.step()
        schedule.step()
        theirs.zero_grad()
    for (name, mine), other in zip(
        ours.model.module.named_parameters(), theirs.model.module.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)


def test_zero_grad_of_the_model_resets_compact_gradients_until_detached() -> None:
    optimizer = make()
    model = optimizer.model
    ids = torch.tensor([ROWS[0]["input_ids"]])
    model.backward(model(input_ids=ids, labels=ids).loss)
    assert all(bool(support.grad.any()) for support in optimizer.supports)
    model.module.zero_grad()
    assert not any(bool(support.grad.any()) for support in optimizer.supports)
    model.detach()
    assert "zero_grad" not in vars(model.module)
