"""``bank.layer: auto``: the hidden layer by which held-out prompts find their task best.

It is chosen when a bank is begun, among the tasks and general sets of the run that begins it, and written into the bank's index:
signatures of different layers cannot be compared, so later tasks take the layer of the bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.bound import cantelli_limits
from trace_dist.bank.retrieval import Retriever
from trace_dist.bank.signature import fit_signature
from trace_dist.config.checks import AUTO
from trace_dist.continual.judge import Judge
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


def bank_layer(judge: Judge, model: ShardedModel, folder: BankFolder) -> int:
    """The layer of a bank: its own where there is one, otherwise what the configuration says or what is best. Collective.

    Raises:
        ValueError: the layer is to be chosen, and there is but one set of prompts.
    """
    wanted = judge.cfg.bank.layer
    if wanted != AUTO:
        return wanted
    known = on_main(lambda: folder.index.is_file())
    return DeltaBank(folder.root).layer if known else choose_layer(judge, model)


def choose_layer(judge: Judge, model: ShardedModel) -> int:
    """Where fewest held-out prompts go wrong; of layers that are level the one with the lower bound, then the lowest.

    Collective.
    """
    sets = [*judge.bench.tasks, *judge.bench.general]
    depth = model.module.config.get_text_config().num_hidden_layers
    layers = sorted({round(share * depth) for share in DEPTHS})
    found = [_representations(judge, model, stream, layers) for stream in sets]

    def choose() -> int:
        losses = [_losses(judge, sets, [each[:, place] for each in found]) for place in range(len(layers))]
        best = min(range(len(layers)), key=lambda place: losses[place])
        for layer, (error, bound) in zip(layers, losses, strict=True):
            logger.info(
                "bank.layer %d: %.1f %% of held-out prompts go wrong (bound %.1f %%)", layer, error, bound
            )
        return layers[best]

    return on_main(choose)


def _representations(
    judge: Judge, model: ShardedModel, stream: Stream, layers: Sequence[int]
) -> torch.Tensor:
    """[N, L, hidden] of a set's training prompts."""
    return judge.represent_layers(model, stream.task.train["prompt"][:NUM_PROMPTS], layers)


def _losses(judge: Judge, sets: Sequence[Stream], x: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Percent of held-out prompts that go wrong, and the bound on it by their margins (``bound.cantelli_limits``)."""
    bank = judge.cfg.bank
    retriever = Retriever(
        fit_signature(each, bank.clusters, judge.cfg.seed, stream.task.name, 0.5, bank.signature)
        for stream, each in zip(sets, x, strict=True)
    )
    heldout = [signature.heldout for signature in retriever.signatures]
    wrong = sum(int((retriever.predict(each) != index).sum()) for index, each in enumerate(heldout))
    return 100 * wrong / sum(map(len, heldout)), 100 * cantelli_limits(retriever).mean().item()
