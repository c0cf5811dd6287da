"""Images: what cannot be is one clear error before any work."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modality.small import make_config

from trace_dist.config import (
    ContinualConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TinyConfig,
    VitConfig,
)
from trace_dist.continual.driver import check_methods
from trace_dist.data import load_examples
from trace_dist.data.examples import as_dataset
from trace_dist.data.pictures import picture_of, png_of, uri_of
from trace_dist.data.tasks import Task
from trace_dist.modality import image
from trace_dist.models.loading import load_tokenizer
from trace_dist.stages.base import prepare_base
from trace_dist.stages.preview import preview
from trace_dist.train.workbench import Tasks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "exact_match"},
            "tasks.of_4_2.metric='exact_match': scores tasks of data.modality text, ",
        ),
        ({"answers": ["4", "x"]}, "tasks.of_4_2.answers=['4', 'x']: no example has the answer 'x'; "),
        (
            {"path": "images:nothing"},
            "tasks.path='nothing': there is no such part; choose among digits, letters",
        ),
        ({"path": "example:copy.jsonl", "answers": None}, "tasks.of_4_2: training example 0: prompt "),
    ],
)
def test_a_task(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    cfg = make_config(tmp_path, ["retrieved"])
    cfg = replace(cfg, tasks=[replace(cfg.tasks[0], **changes)])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        Tasks.load(cfg)
    assert "\n" not in str(caught.value)


def test_a_base_of_another_modality(tmp_path: Path) -> None:
    cfg = make_config(tmp_path, ["retrieved"], data=DataConfig())
    with pytest.raises(
        ValueError, match=r"^target\.vit: makes a classifier of images, but data\.modality is 'text'"
    ):
        prepare_base(cfg, "target")


def test_a_base_of_texts(tmp_path: Path) -> None:
    cfg = make_config(
        tmp_path, ["retrieved"], target=ModelConfig(str(tmp_path / "target"), tiny=TinyConfig())
    )
    with pytest.raises(
        ValueError, match=r"target\.tiny: makes a model of texts, but data\.modality is image"
    ):
        Tasks.load(cfg)


def test_a_head_without_room(tmp_path: Path) -> None:
    vit = VitConfig(
        steps=0, hidden_size=8, num_layers=1, num_heads=1, classes=["2", "4"], pretrain="images:digits"
    )
    cfg = make_config(tmp_path, ["retrieved"], target=ModelConfig(str(tmp_path / "target"), vit=vit))
    with pytest.raises(
        ValueError, match=r"^target\.vit\.classes=\['2', '4'\]: lacks the tasks' class '6'; add it"
    ):
        prepare_base(cfg, "target")
    prepare_base(replace(cfg, tasks=cfg.tasks[:1]), "target")
    with pytest.raises(
        ValueError, match=r"^tasks\.of_7_6: the head of the target has no row for the class '6'; "
    ):
        Tasks.load(cfg)


def test_what_reads_texts(tmp_path: Path) -> None:
    cfg = make_config(tmp_path, ["retrieved"])
    with pytest.raises(ValueError, match=r"^data\.packing=True: only texts can share a row"):
        DataConfig(modality="image", packing=True)
    with pytest.raises(ValueError, match=r"^continual\.methods='consolidated': asks teachers for texts"):
        check_methods(replace(cfg, continual=ContinualConfig(["retrieved", "consolidated"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "vit.image_size=9: must be a positive multiple of patch_size=4; "),
        ({"hidden_size": 30}, "vit.hidden_size=30: must be a positive multiple of num_heads=4; "),
        ({"steps": -1}, "vit.steps=-1: must not be negative; "),
    ],
)
def test_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        VitConfig(**changes)


def test_commands_that_read_texts(run: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"target': reads no text, it is a classifier of images; set data.modality"
    ):
        load_tokenizer(run.target.path)
    with pytest.raises(
        ValueError, match=r"^data\.modality='image': only runs on texts are looked at beforehand; "
    ):
        preview(run)
    made = replace(run, target=replace(run.target, path=f"{run.target.path}-not-made"), data=DataConfig())
    with pytest.raises(
        ValueError, match=r"^tasks\.of_4_2\.metric='top1': scores tasks of data\.modality image, but "
    ):
        Tasks.load(made)


def pictures(*answers: str) -> list[dict[str, str]]:
    """A grey image of its own for each answer."""
    return [
        {"prompt": uri_of(png_of(np.full((8, 8), 9 * i, np.uint8))), "answer": answer}
        for i, answer in enumerate(answers)
    ]


def jpeg_of(prompt: str) -> bytes:
    file = io.BytesIO()
    picture_of(prompt).resize((64, 64)).save(file, "JPEG")
    return file.getvalue()


def check(train: list[dict[str, str]], test: list[dict[str, str]], validation: list[dict[str, str]]) -> None:
    parts = [as_dataset(rows) for rows in (train, test, validation)]
    task = Task("x", *parts[:2], None, "top1", 0.0, 0.0, validation=parts[2])
    reader = image.ImageReader(None, {"a": 0, "b": 1})
    image.check_size(task, reader, "target", None, True, DataConfig(modality="image"), EvalConfig())


def test_every_picture_and_class_is_checked() -> None:
    good = pictures("a", "b", "a")
    good[1]["prompt"] = uri_of(photo := jpeg_of(good[1]["prompt"]))
    check(good, good, good)
    # A JPEG file has no checksums: its pixels are looked at.
    with pytest.raises(ValueError, match=r"^test example 1: prompt .* cannot be read .*; drop or mend it"):
        check(good, [good[0], {**good[1], "prompt": uri_of(photo[: len(photo) // 2])}], good)
    cut = [*good[:2], {**good[2], "prompt": good[2]["prompt"][:-24]}]
    for parts, name in (
        ((cut, good, good), "training"),
        ((good, cut, good), "test"),
        ((good, good, cut), "validation"),
    ):
        with pytest.raises(
            ValueError, match=rf"^{name} example 2: prompt .* cannot be read .*; drop or mend it"
        ):
            check(*parts)
    with pytest.raises(ValueError, match=r"the head of the target has no row for the class 'c'"):
        check(good, good, pictures("a", "c"))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for i, row in enumerate(pictures("a", "b", "a", "b")):
        file = tmp_path / "train" / row["answer"] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture_of(row["prompt"]).save(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=rf"{re.escape(str(file))}: an image that cannot be read .*; drop or mend it"
    ):
        load_examples(TaskConfig("t", str(tmp_path), metric="top1"), seed=0)
