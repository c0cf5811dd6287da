"""Part of stage ``base``: a tiny vision transformer, pretrained on images that are none of the tasks'."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import datasets
from transformers import ViTImageProcessorPil

from trace_dist.config import RunConfig, TaskConfig, VitConfig
from trace_dist.data.batches import Batches
from trace_dist.data.modality import load_modality
from trace_dist.data.pictures import picture_of, png_of, uri_of
from trace_dist.data.tasks import load_task
from trace_dist.models.vit import build_vit, give_head
from trace_dist.stages.words import fall
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.metric_log import MetricLog
from trace_dist.train.workbench import Tasks
from trace_dist.utils.files import atomic_folder
from trace_dist.utils.log import outcome

TURNS = ("0", "90", "180", "270")
"""Classes of the pretext ``rotations``: degrees, against the clock."""


def make_vit(vit: VitConfig, cfg: RunConfig, folder: Path, role: str) -> None:
    """Pretrain a classifier on other images, give it a new head for the tasks' classes, and write it with its image processor.

    Raises:
        ValueError: the run's modality is another one, the images are missing, or ``vit.classes`` lacks a class of the tasks.
    """
    if cfg.data.modality != "image":
        raise ValueError(
            f"{role}.vit: makes a classifier of images, but data.modality is {cfg.data.modality!r}; set it to image"
        )
    classes = _classes(vit, Tasks.load(cfg), role)
    seen = _seen(vit, cfg.seed, role)
    known = sorted(set(seen["answer"][:]))
    module = build_vit(vit, known, cfg.seed)
    with atomic_folder(folder) as partial:
        size = {"height": vit.image_size, "width": vit.image_size}
        ViTImageProcessorPil(size=size, do_resize=True, do_rescale=True, do_normalize=True).save_pretrained(
            partial
        )
        module.save_pretrained(partial)
        if vit.steps:
            _pretrain(module, seen, vit, cfg, partial, role)
        give_head(module, classes, cfg.seed)
        module.save_pretrained(partial)


def _classes(vit: VitConfig, loaded: Tasks, role: str) -> list[str]:
    """The rows of the head."""
    found = sorted({answer for task in loaded.tasks for part in task.parts for answer in part["answer"][:]})
    missing = set(found) - set(vit.classes or found)
    if missing:
        raise ValueError(
            f"{role}.vit.classes={vit.classes!r}: lacks the tasks' class {min(missing)!r}; add it"
        )
    return list(vit.classes or found)


def _seen(vit: VitConfig, seed: int, role: str) -> datasets.Dataset:
    """The images of the pretraining, with what is learned of them."""
    task = TaskConfig(f"{role}-pretraining", path=vit.pretrain, num_train=sys.maxsize, metric="top1")
    images = load_task(task, seed).train
    if vit.pretext == "classes":
        return images
    turned = [
        {"prompt": uri_of(png_of(picture_of(prompt).rotate(int(turn), expand=True))), "answer": turn}
        for prompt in images["prompt"][:]
        for turn in TURNS
    ]
    return datasets.Dataset.from_list(turned)


def _pretrain(
    module: object, seen: datasets.Dataset, vit: VitConfig, cfg: RunConfig, folder: Path, role: str
) -> None:
    modality = load_modality("image")
    reader = modality.load_reader(folder)
    batches = Batches(
        modality.encode(seen, reader, cfg.data),
        batch_size=vit.batch_size,
        micro_batch_size=vit.batch_size,
        seed=cfg.seed,
        **modality.batching(reader),
    )
    learner = DenseLearner(module, module.parameters(), cfg.train, lr=vit.lr)  # type: ignore
    log, label = MetricLog(cfg.folder, f"base/{role}", cfg.train.trackers), f"pretrain {role}"
    train = replace(cfg.train, lr=vit.lr)
    result = train_steps(
        learner, batches, train, vit.steps, description=label, rate=f"{role}.vit.lr", log=log
    )
    log.close()
    outcome(f"{label}: {fall([result.losses])}")
