"""A run's proxy beside its target: which part of it the proxy is, and the proxy itself where both read the same tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trace_dist.config import RunConfig
from trace_dist.models.fingerprint import same_model
from trace_dist.models.loading import load_model, load_tokenizer
from trace_dist.models.origin import Origin
from trace_dist.models.prune import evenly_cut
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.workbench import Workbench
from trace_dist.utils import dist
from trace_dist.utils.together import on_main


def proxy_origin(cfg: RunConfig, model: ShardedModel, model_id: str) -> Origin | None:
    """Which part of the target the run's proxy is; None where it does not say that it is one. Collective.

    Args:
        cfg: the run.
        model: the target.
        model_id: its fingerprint.

    Raises:
        ValueError: the proxy was cut out of another model.
    """
    found = on_main(lambda: stated_origin(cfg, model.module, model_id))
    if found is not None and not same_model(found.target, model_id):
        raise ValueError(
            f"proxy.path={cfg.probed.path!r}: it was cut out of another model than target.path={cfg.target.path!r}; delete the "
            "proxy to have it made of this one, or choose another projection.placement"
        )
    return found


def stated_origin(cfg: RunConfig, target: nn.Module, model_id: str) -> Origin | None:
    """Which part of its target the run's proxy says that it is; None where it says nothing.

    Args:
        cfg: the run.
        target: with storage or without.
        model_id: its fingerprint, for copies of earlier releases, which keep none.
    """
    if cfg.proxy is None:
        return None
    prune = cfg.proxy.prune
    found = Origin.load(Path(cfg.proxy.path))
    if found is None and prune is not None and not prune.is_narrow and prune.layers is not None:
        # Made by an earlier release, which kept no record of whole layers.
        found = evenly_cut(target, prune.layers, model_id)
    return found


def same_tokens(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> bool:
    """Whether proxy and target have one vocabulary; the target's tokenizer is read where it is not given."""
    its = load_tokenizer(cfg.target.path) if tokenizer is None else tokenizer
    return bool(load_tokenizer(cfg.probed.path).get_vocab() == its.get_vocab())


def proxy_module(cfg: RunConfig, bench: Workbench) -> nn.Module | None:
    """The proxy, frozen, in fp32 on this rank's device; None where it does not read the tokens of the target's data."""
    if not same_tokens(cfg, bench.tokenizer):
        return None
    module: nn.Module = load_model(cfg.probed.path, torch.float32)
    return module.to(dist.local_device()).requires_grad_(False).eval()
