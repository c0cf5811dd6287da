"""Metric top1: the likeliest class of a picture is right. Of weights that know the classes of one task alone, these compete."""

from __future__ import annotations

from typing import Any

import torch

from trace_dist.config import DataConfig, EvalConfig
from trace_dist.data.examples import references_of
from trace_dist.data.tasks import Task
from trace_dist.evaluation.inputs import device_of
from trace_dist.evaluation.passes import evaluating, map_over_ranks
from trace_dist.evaluation.score import Score, mean_score

label = "top-1 accuracy"
modality = "image"


def evaluate(
    model: torch.nn.Module, reader: Any, task: Task, cfg: EvalConfig, data: DataConfig | None
) -> Score:
    """Percent of the test pictures whose class is the likeliest; among ``task.among`` where that is set. Collective.

    Args:
        model: a classifier of images, possibly sharded.
        reader: of pictures (``modality.image.ImageReader``).
        task: its test examples are scored.
        cfg: batch size.
        data: is not read.
    """
    rows, names = task.test.to_list(), reader.names
    open_to = [i for i, name in enumerate(names) if task.among is None or name in task.among]

    def run(batch: list[int]) -> list[str]:
        pixels = reader.stacked([rows[i]["prompt"] for i in batch]).to(device_of(model))
        best = model(pixel_values=pixels).logits[:, open_to].argmax(dim=1)
        return [names[open_to[place]] for place in best.tolist()]

    with evaluating(model) as alone:
        taken = map_over_ranks([1] * len(rows), cfg.batch_size, run, alone)
    return mean_score(
        [float(said in references_of(row)) for said, row in zip(taken, rows, strict=True)], taken
    )
