"""``bank.layer: auto`` and ``bank.pooling: auto``: the hidden layer, and the pooling over a prompt's tokens, by which held-out
prompts find their task best.

They are chosen when a bank is begun, among the tasks and general sets of the run that begins it, and written into the bank's
index: signatures of different layers or poolings cannot be compared, so later tasks take those of the bank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.bound import cantelli_limits
from trace_dist.bank.representation import alike
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import MIN_PROMPTS, fit_signature
from trace_dist.config.bank import View
from trace_dist.config.checks import AUTO
from trace_dist.continual.judge import Judge
from trace_dist.continual.sample import seen_once
from trace_dist.data.examples import prompt_key
from trace_dist.run_folder import BankFolder
from trace_dist.sharding.base import ShardedModel
from trace_dist.train.workbench import Stream
from trace_dist.utils.log import get_logger
from trace_dist.utils.together import on_main

logger = get_logger(__name__)
NUM_PROMPTS = 80
"""Prompts of each task or general set that are looked at; half of them are held out."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the model's layers below a layer that is tried."""


def bank_view(judge: Judge, model: ShardedModel, folder: BankFolder) -> View:
    """Layer and pooling of a bank: its own where there is one, otherwise what the configuration says or what is best. Collective.

    Raises:
        ValueError: one is to be chosen, and there is but one set of prompts.
    """
    wanted = judge.cfg.bank
    if AUTO not in (wanted.layer, wanted.pooling):
        return wanted.view
    if not on_main(lambda: folder.index.is_file()):
        return choose_view(judge, model)
    bank = DeltaBank(folder.root)
    layer = bank.layer if wanted.layer == AUTO else wanted.layer
    return layer, bank.pooling if wanted.pooling == AUTO else wanted.pooling


def choose_view(judge: Judge, model: ShardedModel) -> View:
    """Where fewest held-out prompts go wrong; of those that are level the one with the lower bound, then the lowest layer, then
    the first pooling.

    Collective.
    """
    wanted, tasks, general = judge.cfg.bank, judge.bench.tasks, judge.bench.general
    sets, groups = [*tasks, *general], [*([task] for task in tasks), *([general] if general else [])]
    if wanted.layer == "auto":
        depth = model.module.config.get_text_config().num_hidden_layers
        layers = sorted({round(share * depth) for share in DEPTHS})
    else:
        layers = [wanted.layer]
    poolings = list(judge.bench.modality.poolings) if wanted.pooling == "auto" else [wanted.pooling]
    found = [
        judge.represent_views(model, prompts, layers, poolings)
        for group in groups
        for prompts in _looked_at(judge, group)
    ]

    def choose() -> View:
        losses = {
            (layer, pooling): _losses(judge, sets, [each[pooling][:, place] for each in found])
            for place, layer in enumerate(layers)
            for pooling in poolings
        }
        for (layer, pooling), (error, bound) in losses.items():
            logger.info(
                "bank.layer %d, bank.pooling %s: %.1f %% of held-out prompts go wrong (bound %.1f %%)",
                layer, pooling, error, bound,
            )  # fmt: skip
        return min(losses, key=losses.__getitem__)

    return on_main(choose)


def _looked_at(judge: Judge, group: list[Stream]) -> Iterator[list[Any]]:
    """Of each stream of a signature, the prompts that are looked at.

    None is held out of the signature: limits on errors rest on those, and would promise too much of the best of some views on
    them. All are taken where fewer are left than a signature is made of; then a limit says next to nothing.
    """
    held = judge.held_out(group)
    for stream in group:
        every = seen_once(stream.task, NUM_PROMPTS + len(held))
        free = [prompt for prompt in every if prompt_key(prompt) not in held]
        yield (free if len(free) >= MIN_PROMPTS else every)[:NUM_PROMPTS]


def _losses(judge: Judge, sets: Sequence[Stream], x: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Percent of held-out prompts that go wrong, and the bound on it by their margins (``bound.cantelli_limits``)."""
    if alike(x):
        return 100.0, 100.0
    bank = judge.cfg.bank
    retriever = Retriever(
        fit_signature(each, bank.clusters, judge.cfg.seed, stream.task.name, 0.5, bank.signature)
        for stream, each in zip(sets, x, strict=True)
    )
    heldout = [signature.heldout for signature in retriever.signatures]
    wrong = sum(int((retriever.predict(each) != index).sum()) for index, each in enumerate(heldout))
    return 100 * wrong / sum(map(len, heldout)), 100 * cantelli_limits(retriever).mean().item()
