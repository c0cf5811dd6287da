"""Weights that are loaded after the optimizer was built are trained on from there, not overwritten by older copies."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from engine.cases import CASES, batches
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

from trace_dist import Mask, MaskedAdamW

CASE = replace(CASES["element"], steps=2)
IDS = [ids for ids, _ in batches(CASE)]
COPIES = [(torch.bfloat16, "none"), (torch.bfloat16, "cpu"), (torch.float16, "none"), (torch.float32, "cpu")]


def make(dtype: torch.dtype = torch.bfloat16, lr: float = 1e-2, **options: str) -> MaskedAdamW:
    model = CASE.model().to(dtype)
    return MaskedAdamW(model, Mask.random(model, 0.5, seed=0), lr=lr, **options)


def step(optimizer: MaskedAdamW, number: int = 0) -> None:
    module = optimizer.model.module
    module(input_ids=IDS[number], labels=IDS[number]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict of other values."""
    return {name: (value + 0.25).to(dtype) for name, value in CASE.model().state_dict().items()}


@pytest.mark.parametrize(("dtype", "offload"), COPIES)
def test_a_step_without_a_rate_leaves_what_was_loaded(
    dtype: torch.dtype, offload: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = make(dtype, lr=0.0, offload=offload)
    module = optimizer.model.module
    step(optimizer)
    assert "were loaded" not in caplog.text
    module.load_state_dict(moved(dtype))
    with caplog.at_level(logging.WARNING):
        step(optimizer)
        step(optimizer, 1)
    assert all(torch.equal(value, moved(dtype)[name]) for name, value in weights(module).items())
    assert caplog.text.count("were loaded after it was built") == 1


@pytest.mark.parametrize(("dtype", "offload"), COPIES)
def test_what_is_saved_before_the_next_step(
    dtype: torch.dtype, offload: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = make(dtype, offload=offload)
    optimizer.model.module.load_state_dict(moved(dtype))
    with caplog.at_level(logging.WARNING):
        optimizer.state_dict()
    assert caplog.text.count("were loaded after it was built") == 1
    assert f"the weights of {len(optimizer.supports)} parameters" in caplog.text
    for support, values in zip(optimizer.supports, optimizer.state_dict()["values"], strict=True):
        expected = moved(dtype)[support.name].flatten()[optimizer.mask.elements(support.name)]
        assert torch.equal(values, expected.to(values.dtype)), support.name


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_same_weights_cost_no_precision(offload: str, caplog: pytest.LogCaptureFixture) -> None:
    """As when DDP is put around the model, which sends rank 0's to all: training goes on bit for bit."""
    ours, theirs = make(offload=offload), make(offload=offload)
    for optimizer in (ours, theirs):
        step(optimizer)
    ours.model.module.load_state_dict(weights(ours.model.module))
    for optimizer in (ours, theirs):
        step(optimizer, 1)
    assert all(
        torch.equal(ours.values(s), theirs.values(t))
        for s, t in zip(ours.supports, theirs.supports, strict=True)
    )
    assert "were loaded" not in caplog.text


def test_nobody_looks_where_there_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(torch.float32)
    monkeypatch.setattr(type(optimizer.model), "stamp", None)
    step(optimizer)


def test_values_that_the_optimizer_was_given_are_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer loads the weights, then the state of the optimizer with its master copy."""
    first, second = make(), make()
    step(first)
    second.model.module.load_state_dict(weights(first.model.module))
    second.load_state_dict(first.state_dict())
    monkeypatch.setattr(second.model, "storage", None)
    assert all(
        torch.equal(first.values(s), second.values(t))
        for s, t in zip(first.supports, second.supports, strict=True)
    )


def test_trainer_resumes_from_weights_alone(tmp_path: Path) -> None:
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in torch.cat(IDS)]

    def train(optimizer: MaskedAdamW, steps: int, resume: str | None) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=1,
            max_steps=steps,
            save_steps=2,
            save_only_model=True,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=optimizer.model.module,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=default_data_collator,
            optimizers=(optimizer, None),
        )
        trainer.train(resume_from_checkpoint=resume)
        return weights(optimizer.model.module)

    trained = train(make(), 2, None)
    resumed = train(make(lr=0.0), 3, str(tmp_path / "checkpoint-2"))
    assert any(
        not torch.equal(value, trained[name]) for name, value in CASE.model().bfloat16().state_dict().items()
    )
    assert all(torch.equal(value, trained[name]) for name, value in resumed.items())
