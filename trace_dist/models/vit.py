"""Vision transformers small enough to be trained on the spot, and their heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from trace_dist.config import VitConfig

HEAD = "classifier"
"""transformers' name of the output head of an image classifier; its weight has a row for each class."""


def build_vit(cfg: VitConfig, classes: Sequence[str], seed: int) -> ViTForImageClassification:
    """A randomly initialised classifier of RGB images, in fp32, in training mode. The global random state is left as it was.

    Args:
        cfg: sizes.
        classes: names, in the order of the head's rows.
        seed: of the initial weights.
    """
    config = ViTConfig(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.hidden_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        intermediate_size=cfg.intermediate_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_labels(classes),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(config).train()


def give_head(module: Any, classes: Sequence[str], seed: int) -> None:
    """Replace a classifier's head by a new one for other classes: small random rows, so that gradients reach the body."""
    weight = torch.empty(len(classes), module.config.hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nn.init.normal_(weight, std=module.config.initializer_range)
    head = nn.Linear(module.config.hidden_size, len(classes))
    head.weight, head.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(classes)))
    setattr(module, HEAD, head)
    module.num_labels = len(classes)
    for name, value in _labels(classes).items():
        setattr(module.config, name, value)


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
