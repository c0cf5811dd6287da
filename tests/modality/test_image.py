"""Images through the same probe, masks, engine, bank and retrieval as texts."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from modality.small import CLASSES
from transformers import DeiTImageProcessorPil

from trace_dist.bank.bank import DeltaBank
from trace_dist.config import RunConfig
from trace_dist.continual.setting import Setting
from trace_dist.data.encoding import IGNORE
from trace_dist.data.pictures import png_of, uri_of
from trace_dist.evaluation import evaluate_task
from trace_dist.masks import Mask
from trace_dist.modality.image import ImageReader, collate, nll_sum, pooled
from trace_dist.models.loading import load_model
from trace_dist.stages.report import collect_results

TASKS = [f"of_{'_'.join(answers)}" for answers in CLASSES]
ROWS = {"2": 0, "4": 1, "6": 2, "7": 3}
"""Classes of the run in the order of the head."""


def result(cfg: RunConfig, method: str) -> dict[str, Any]:
    return json.loads(cfg.folder.method(method).read_text())


@pytest.fixture(scope="module")
def setting(run: RunConfig) -> Setting:
    return Setting.load(run)


def test_tasks_are_learned_and_not_forgotten(run: RunConfig) -> None:
    """No task is named: what an image is answered with lies behind retrieval."""
    found = result(run, "retrieved")
    R, retrieval = np.array(found["R"]), found["retrieval"]
    assert R[1, 0] > 95
    assert R[2].mean() > 90
    assert retrieval["accuracy"] > 90
    # what is forgotten was retrieved wrongly
    assert found["forgetting"] <= 100 - retrieval["accuracy"]
    assert found["pilot_average_accuracy"] == pytest.approx((R[1, 0] + R[2].mean()) / 2)
    assert [each["answer"] in CLASSES[TASKS.index(each["retrieved"])] for each in retrieval["examples"]]


def test_a_mask_holds_the_rows_of_its_classes_whatever_was_selected(run: RunConfig) -> None:
    for task, answers in zip(TASKS, CLASSES, strict=True):
        for kind in ("projected", "random"):
            dense = Mask.load(run.folder.mask(task, kind)).dense("classifier.weight")
            assert dense[[ROWS[answer] for answer in answers]].all()
            # of a random one the other rows have their share
            assert kind == "projected" or not dense.all()


def test_a_delta_answers_among_its_own_classes_alone(run: RunConfig, setting: Setting) -> None:
    bank, model = DeltaBank(run.bank_of().root), setting.model
    first, second = (stream.task for stream in setting.bench.tasks)
    with bank.activated(model, TASKS[0]):
        closed = evaluate_task(
            model.module, setting.bench.tokenizer, replace(second, among=first.answers), run.eval
        )
        mine = evaluate_task(
            model.module, setting.bench.tokenizer, replace(first, among=first.answers), run.eval
        )
    assert set(closed.answers) <= set(CLASSES[0])
    assert closed.value == 0
    assert mine.value > 95
    before = load_model(run.target.path)
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before.get_parameter(name)), name


def test_the_nearest_mean_is_that_of_the_formula(run: RunConfig, setting: Setting) -> None:
    judge, layer = setting.judge, int(run.bank.layer)
    x, y = [], []
    for stream in setting.bench.tasks:
        x.append(judge.represent(setting.model, stream.task.train["prompt"][:], layer).double())
        y += stream.task.train["answer"][:]
    train, names = torch.cat(x), sorted(ROWS)
    means = torch.stack([train[[answer == name for answer in y]].mean(0) for name in names])
    R = result(run, "nearest_mean")["R"][-1]
    for score, stream in zip(R, setting.bench.tasks, strict=True):
        test = judge.representations(setting.model, stream.task, layer).double()
        best = torch.cosine_similarity(test[:, None], means[None], dim=2).argmax(1).tolist()
        right = [names[i] == said for i, said in zip(best, stream.task.test["answer"][:], strict=True)]
        assert score == pytest.approx(100 * sum(right) / len(right))


def test_random_features_know_the_classes_of_all_tasks(run: RunConfig) -> None:
    found = result(run, "random_features")
    assert found["lr"] is None
    assert np.mean(found["R"][-1]) > np.mean(result(run, "nearest_mean")["R"][-1])


def test_adapters_have_heads_of_their_own(run: RunConfig) -> None:
    found = result(run, "lora_retrieved")
    assert found["R"][1][0] > 70
    assert found["retrieval"]["accuracy"] == result(run, "retrieved")["retrieval"]["accuracy"]


def test_the_report_shows_them(run: RunConfig) -> None:
    modes = collect_results(run)["modes"]
    assert modes["nearest_mean"]["label"] == "nearest class mean"
    assert modes["retrieved"]["pilot_average_accuracy"] > 90


def test_the_loss_is_the_mean_over_images(setting: Setting) -> None:
    step = setting.bench.one_batch([setting.bench.tasks[0].encoded.select(range(12))])
    model, total = setting.model.module, 0.0
    for batch in step.micro_batches:
        labels = batch.pop("labels")
        total += float(nll_sum(model, batch, labels, 1 / step.num_answer_tokens))
        logits = model(**batch).logits
        assert set(labels.tolist()) <= {ROWS["2"], ROWS["4"]}
    assert step.num_answer_tokens == 12
    expected = torch.nn.functional.cross_entropy(logits, labels).item() * len(labels) / 12
    assert float(nll_sum(model, batch, labels, 1 / 12)) == pytest.approx(expected, rel=1e-6)
    assert 0 < total < 3


def test_what_lies_where_is_kept() -> None:
    states = torch.zeros(1, 17, 1)
    states[0, 0], states[0, 4] = 5.0, 4.0  # the class token, and the patch at the top right
    assert pooled(states).tolist() == [[5.0, 0.0, 1.0, 0.0, 0.0]]
    assert pooled(torch.ones(2, 7, 3)).shape == (2, 6)


def test_other_numbers_of_ranks_get_black_images_without_labels(setting: Setting) -> None:
    """A rank that is short of examples calls the model all the same."""
    filler = setting.bench.batches([setting.bench.tasks[0]], 1, seed=0)._tensors([])
    assert filler["pixel_values"].shape == (1, 3, 8, 8)
    assert nll_sum(setting.model.module, {"pixel_values": filler["pixel_values"]}, filler["labels"]) == 0


@pytest.mark.parametrize("size", [{"height": 10, "width": 10}, {"shortest_edge": 10}])
def test_black_images_are_cropped_as_others_are(size: dict[str, int]) -> None:
    """The processors of DeiT's checkpoints resize beyond what their models read."""
    processor = DeiTImageProcessorPil(size=size, do_center_crop=True, crop_size={"height": 8, "width": 8})
    reader, row = ImageReader(processor, {"a": 0}), {"image": uri_of(png_of(np.full((9, 12), 7, np.uint8)))}
    filler, seen = collate(reader, []), collate(reader, [{**row, "labels": [0]}])
    assert filler["pixel_values"].shape == seen["pixel_values"].shape == (1, 3, 8, 8)
    assert filler["labels"].tolist() == [IGNORE]
