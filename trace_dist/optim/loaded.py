"""Copies of weights follow what somebody loads into the model after the optimizer was built.

A master copy, or the host's values, would be written over it at the next step. So every weight has a stamp
(``ShardedModel.stamp``), and where it changed the copies are compared with the weights: an entry that still is what its copy is
rounded to keeps its full precision, as after loading the very same weights, and any other is taken anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather

from trace_dist.utils.log import get_logger

if TYPE_CHECKING:
    from trace_dist.sharding.base import ShardedModel
    from trace_dist.sharding.support import Support

logger = get_logger(__name__)


class Loaded:
    """Sees that weights were loaded, and takes their copies anew.

    Args:
        model: the model, whose weights agree with the copies now.
        copies: per support what must agree with its weight: tensors [n] of any floating dtype, on any device. Those of NF4
            weights are left alone: their masked entries lie in an overlay, into which nothing is loaded.
    """

    def __init__(self, model: ShardedModel, copies: Iterable[tuple[Support, list[Tensor]]]) -> None:
        self._model = model
        found = [(support, tensors) for support, tensors in copies if tensors and model.dense([support])]
        self._supports = [support for support, _ in found]
        self._copies = {support.name: tensors for support, tensors in found}
        self._stamps: dict[str, tuple[int, int]] = {}
        self.agree()

    def agree(self) -> None:
        """All copies were made to agree with the weights by somebody else."""
        self._stamps = {name: self._model.stamp(name) for name in self._copies}

    @torch.no_grad()
    def follow(self, supports: Iterable[Support]) -> None:
        """Take all copies anew whose weights were loaded since, where one of some supports was: it is said once for all."""
        if not any(map(self._is_written, supports)):
            return
        changed = [s.name for s in self._supports if self._is_written(s) and self._take(s)]
        if changed:
            logger.warning(
                "MaskedAdamW: the weights of %d parameters, such as %s, were loaded after it was built: training goes on from "
                "them, with the moments that it has",
                len(changed),
                changed[0],
            )

    def _is_written(self, support: Support) -> bool:
        stamp = self._stamps.get(support.name)
        return stamp is not None and stamp != self._model.stamp(support.name)

    def _take(self, support: Support) -> bool:
        """Let the copies of one support agree with its weight; whether one did not."""
        local, runs = self._model.storage(support)
        loaded, changed = compact_gather(local, runs).to(local.dtype), False
        for copy in self._copies[support.name]:
            here = loaded.to(copy.device)
            differs = copy.to(here.dtype) != here
            copy.copy_(torch.where(differs, here.to(copy.dtype), copy))
            changed = changed or bool(differs.any())
        self._stamps[support.name] = self._model.stamp(support.name)
        return changed
