"""A base that is made on the spot: by turns of images, without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from modality.small import VIT, make_config

from trace_dist.config import ModelConfig
from trace_dist.data.pictures import picture_of
from trace_dist.models.loading import load_model
from trace_dist.stages.base import prepare_base
from trace_dist.stages.vit import TURNS, _seen


def test_turned_images_are_the_labels_of_their_turns() -> None:
    seen = _seen(replace(VIT, pretext="rotations"), 0, "target")
    assert len(seen) == 4 * 1198
    first = [np.asarray(picture_of(row["prompt"]))[..., 0] for row in seen.select(range(4))]
    for turns, (image, answer) in enumerate(zip(first, seen["answer"][:4], strict=True)):
        assert answer == TURNS[turns]
        assert np.array_equal(image, np.rot90(first[0], turns))


def test_a_base_has_a_row_for_every_class(tmp_path: Path) -> None:
    classes = [str(digit) for digit in range(10)]
    vit = replace(
        VIT, pretext="rotations", steps=2, hidden_size=8, num_heads=1, num_layers=1, classes=classes
    )
    cfg = make_config(tmp_path, ["retrieved"], target=ModelConfig(str(tmp_path / "target"), vit=vit))
    model = load_model(prepare_base(cfg, "target"))
    assert model.config.label2id == {name: row for row, name in enumerate(classes)}
    assert model.classifier.weight.shape == (10, 8)
    assert 0 < float(model.classifier.weight.detach().abs().max()) < 0.2
    assert not model.classifier.bias.detach().any()
