"""Correlations between the activations of a proxy and its target on the same prompts.

Three places of each decoder layer are read: the residual stream at its input, the attention heads' outputs at the input of the
output weight, and the MLP's neurons at the input of its down weight. A layer of the target is compared with the proxy's at its
relative depth. Sums over tokens are added up over ranks, so each rank runs its own share of a batch. Every rank holds all sums,
so a few layers are read at a time (``passes``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trace_dist.data.batches import Batches
from trace_dist.data.encoding import IGNORE
from trace_dist.models.roles import ParamInfo, describe
from trace_dist.models.streams import one_stream
from trace_dist.train.loss import forward_nll_sum
from trace_dist.utils import dist
from trace_dist.utils.devices import sent

Place = Literal["hidden", "heads", "intermediate"]
MOST_BYTES = 2 * 2**30
"""Sums that a rank holds in host memory at once, unless those of one layer are more."""


@dataclass
class Moments:
    """Sums over tokens of the activations of both models at one place.

    Attributes:
        count: tokens.
        sums, squares: [n_target], then [n_proxy], fp64.
        cross: [n_target, n_proxy] fp32, of the distances from this rank's means so far: of channels that are far from 0, products
            of the values themselves would leave no digits for the correlation.
    """

    count: float = 0.0
    sums: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)
    cross: Tensor | None = None

    def add(self, target: Tensor, proxy: Tensor) -> None:
        """Add the activations of the same tokens: [tokens, n] each, fp32."""
        if self.cross is None:
            self.sums = [torch.zeros(x.shape[1], dtype=torch.float64) for x in (target, proxy)]
            self.squares = [torch.zeros_like(each) for each in self.sums]
            self.cross = torch.zeros(target.shape[1], proxy.shape[1])
        if not len(target):
            return
        before, self.count = self.count, self.count + len(target)
        centred, apart = [], []
        for x, sums, squares in zip((target, proxy), self.sums, self.squares, strict=True):
            mean = x.double().mean(0)
            centred.append(x - mean.float())
            apart.append((mean - sums / max(before, 1.0)).float())
            sums += x.double().sum(0)
            squares += x.double().square().sum(0)
        # Chan, Golub and LeVeque 1979: two parts about their own means, and the distance of these.
        self.cross += centred[0].T @ centred[1]
        self.cross.addr_(*apart, alpha=before * len(target) / self.count)

    def correlation(self) -> Tensor:
        """[n_target, n_proxy] fp32, 0 where a unit never changes; the sums are spent then. Collective."""
        if self.cross is None:
            raise AssertionError("no activation was seen")
        device = dist.local_device()
        count = torch.tensor([self.count], dtype=torch.float64, device=device)
        dist.sum_over_ranks(count)

        def mean(local: Tensor) -> Tensor:
            return dist.sum_over_ranks(local.to(device)).cpu() / float(count)

        left, right = (mean(sums.clone()) for sums in self.sums)
        left_squares, right_squares = map(mean, self.squares)
        cross = self.cross.double()
        self.cross = None
        if self.count:
            apart = [sums / self.count - each for sums, each in zip(self.sums, (left, right), strict=True)]
            cross.addr_(*apart, alpha=self.count)
        cross = mean(cross)
        deviations = [
            (squares - means.square()).clamp_min(0).sqrt()
            for means, squares in ((left, left_squares), (right, right_squares))
        ]
        scale = deviations[0][:, None] * deviations[1]
        # In place: it is as large as an MLP of both models.
        cross.div_(scale.clamp_min(1e-12))
        return cross.masked_fill_(scale <= 1e-9, 0.0).float()


class _Recorder:
    """Keeps what flows into some modules of a model, during one pass."""

    def __init__(self, model: Any, places: Mapping[tuple[Place, int], nn.Module]) -> None:
        self._config = model.config
        self.seen: dict[tuple[Place, int], Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._keep(key), with_kwargs=True)
            for key, module in places.items()
        ]

    def _keep(self, key: tuple[Place, int]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            states = one_stream(value.detach(), self._config)
            self.seen[key] = states.float().cpu().flatten(0, -2)

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def places_of(module: nn.Module) -> dict[tuple[Place, int], nn.Module]:
    """(place, layer) -> the module whose input is read there, of the text model, in the order of the layers.

    Raises:
        ValueError: a layer has no output weight or down weight of its own, or several, as those of experts.
    """
    found: dict[tuple[Place, int], nn.Module] = {}
    infos = [info for info in describe(module).values() if info.layer is not None and info.tower == "text"]
    for info in infos:
        role: Place | None = {"o": "heads", "down": "intermediate"}.get(info.role)  # type: ignore[assignment]
        if role is not None and len(info.shape) == 2 and info.layer is not None:
            if (role, info.layer) in found:
                raise ValueError(
                    f"projection.placement='align': layer {info.layer} has several {info.role} weights, such as {info.name}; "
                    "choose another placement"
                )
            found[role, info.layer] = module.get_submodule(info.name.removesuffix(".weight"))
            found["hidden", info.layer] = module.get_submodule(_layer_path(info))
    layers = {info.layer for info in infos}
    if any((place, layer) not in found for layer in layers for place in ("heads", "intermediate")):
        raise ValueError(
            "projection.placement='align': a layer has no output and down weights of its own; choose another placement"
        )
    return found


def _layer_path(info: ParamInfo) -> str:
    path = info.name.split(".")
    return ".".join(path[: path.index(str(info.layer)) + 1])


def widths(module: nn.Module) -> dict[tuple[Place, int], int]:
    """(place, layer) -> numbers that are read there of each token, of the text model."""
    found: dict[tuple[Place, int], int] = {}
    for info in describe(module).values():
        if info.layer is None or info.tower != "text" or len(info.shape) != 2:
            continue
        if info.role == "o":
            found["hidden", info.layer], found["heads", info.layer] = info.shape
        elif info.role == "down":
            found["intermediate", info.layer] = info.shape[1]
    return found


def passes(target: nn.Module, proxy: nn.Module, pairs: Mapping[int, int]) -> list[dict[int, int]]:
    """The pairs in parts, in order: the sums of one take at most MOST_BYTES, or it is one layer.

    Args:
        target, proxy: both models.
        pairs: layer of the target -> layer of the proxy.
    """
    ours, theirs = widths(target), widths(proxy)
    parts: list[dict[int, int]] = []
    room = 0
    for layer, other in pairs.items():
        places = [place for place, each in ours if each == layer]
        num_bytes = sum(4 * ours[place, layer] * theirs[place, other] for place in places)
        if not parts or num_bytes > room:
            parts.append({})
            room = MOST_BYTES
        parts[-1][layer] = other
        room -= num_bytes
    return parts


def correlations(
    target: Any, proxy: nn.Module, pairs: Mapping[int, int], batches: Batches, num_batches: int
) -> dict[tuple[Place, int], Tensor]:
    """(place, layer of the target) -> [n_target, n_proxy] correlations with the proxy's layer. Collective.

    Args:
        target: the sharded target.
        proxy: the proxy, whole on every rank.
        pairs: layer of the target -> layer of the proxy; others are not read.
        batches: in the tokens of both.
        num_batches: how many are read.
    """
    moments: dict[tuple[Place, int], Moments] = {}
    layers = set(pairs), set(pairs.values())
    read = [
        {key: each for key, each in places_of(module).items() if key[1] in wanted}
        for module, wanted in zip((target.module, proxy), layers, strict=True)
    ]
    recorders = [_Recorder(model, places) for model, places in zip((target.module, proxy), read, strict=True)]
    modes = target.module.training, proxy.training
    target.eval(), proxy.eval()
    try:
        with torch.no_grad():
            for _ in range(num_batches):
                for batch in next(batches).micro_batches:
                    _run(target, batch, target.device)
                    _run(proxy, batch, next(proxy.parameters()).device)
                    # Ranks that are short of examples run fillers without answers.
                    answers = bool((batch["labels"] != IGNORE).any())
                    kept = batch["attention_mask"].flatten().bool() & answers
                    for place, layer in list(recorders[0].seen):
                        key: tuple[Place, int] = (place, layer)
                        ours, theirs = recorders[0].seen[key], recorders[1].seen[place, pairs[layer]]
                        moments.setdefault(key, Moments()).add(ours[kept], theirs[kept])
    finally:
        for recorder in recorders:
            recorder.close()
        target.train(modes[0]), proxy.train(modes[1])
    return {key: moments.pop(key).correlation() for key in list(moments)}


def _run(forward: Any, batch: dict[str, Tensor], device: torch.device) -> None:
    inputs = {key: sent(value, device) for key, value in batch.items() if key != "labels"}
    forward_nll_sum(forward, inputs, batch["labels"])
