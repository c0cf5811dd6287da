"""Which decoder blocks of a model are simulated, and how numbers continue from these to all blocks.

[Note: repeated blocks] The program does for each decoder block what it did for the one before that is like it. So models of few
blocks are simulated: one with k blocks of each kind, and for each kind of which there are more, one with one more of them. What
that one adds is what every further block of its kind adds. k is so large that blocks at both ends, of which DeepSpeed keeps 5e8
elements gathered between forward and backward, are not the same. Of an 8B model, 3 and 4 blocks give the bytes that gathers and
reductions send with 8 and 9, those of all-to-all within 2 %, the memory within 0.2 % and the time within 2 %.

Blocks are of one kind if their modules have the same classes, shapes and plain attributes: experts or none, attention or a
state space, a sliding window or none. The smaller models are built without storage and compared block by block, so that a family
whose config cannot say which blocks are wanted is never simulated as another model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn

from trace_dist.models.architecture import empty_model
from trace_dist.models.depth import OWN_INDEX, layer_list, shortened

LOOKS_AHEAD = 6e8
"""Elements that k blocks of a kind have at least ([Note: repeated blocks])."""
FEW = 16
"""Blocks of a model that is simulated whole, unasked, where it cannot be made smaller."""
_PLAIN = (bool, int, str, type(None))
"""Types of attributes that tell kinds apart; others scale values, which is the same work."""


class _Kind(NamedTuple):
    """What a block does.

    Attributes:
        name: class of the block, and of what it is made of.
        size: elements of its parameters.
        modules: paths, classes, shapes and plain attributes of all of its modules.
    """

    name: str
    size: int
    modules: tuple[Any, ...]


class _Model(NamedTuple):
    """One of the models that are simulated: its blocks, as numbers of those of the whole model, and the kind of which the model
    has one more than the first one; None in the first."""

    layers: tuple[int, ...]
    kind: _Kind | None


@dataclass(frozen=True)
class Part:
    """One of the models that are simulated.

    Attributes:
        config: of transformers.
        layers: which decoder blocks of the whole model it has.
        weight: how often its numbers count; the weights of all parts add up to 1.
    """

    config: Any
    layers: tuple[int, ...]
    weight: int


def parts_of(module: nn.Module, config: Any, what: str, fewest: int = 0) -> list[Part]:
    """The models that are simulated in the place of a large one ([Note: repeated blocks]).

    Args:
        module: the large one, on the meta device.
        config: its config.
        what: begins the message, such as ``model='x'``.
        fewest: blocks of each kind in the first of them; 0: as many as ZeRO-3 looks ahead.

    Raises:
        ValueError: a smaller model would have other blocks, and the large one has many.
    """
    number = int(config.get_text_config().num_hidden_layers)
    whole = [Part(config, tuple(range(number)), 1)]
    kinds = _kinds(module, config)
    if not kinds or fewest >= number:
        return whole
    failed = False
    for models in (_picked(kinds, fewest), _prefixes(kinds, fewest)):
        if any(len(model.layers) >= number for model in models):
            continue
        configs = [_smaller(config, model.layers, kinds) for model in models]
        if None not in configs:
            sets = zip(configs, models, _weights(kinds, models), strict=True)
            return [Part(made, model.layers, weight) for made, model, weight in sets]
        failed = True
    if failed and number > FEW:
        found = ", ".join(f"{count} of {kind.name}" for kind, count in Counter(kinds).items())
        raise ValueError(
            f"{what}: its {number} decoder blocks ({found}) are not those of a smaller model of its family, from which they could"
            f" be continued; simulate all of them, with blocks {number}"
        )
    return whole


def added_up(found: Sequence[Any], weights: Sequence[int]) -> Any:
    """What is found of the parts, times their weights, number by number; a name that a part lacks is 0 there."""
    if any(isinstance(each, Mapping) for each in found):
        names = dict.fromkeys(chain.from_iterable(reversed(found)))
        return {name: added_up([each.get(name, 0) for each in found], weights) for name in names}
    return sum(weight * each for weight, each in zip(weights, found, strict=True))


def _kinds(module: nn.Module, config: Any) -> list[_Kind]:
    """Of each decoder block; empty where a model has no one list of them, or some share parameters."""
    path = layer_list(module, config)
    blocks: Any = [] if path is None else module.get_submodule(path)
    owned = [id(parameter) for block in blocks for parameter in block.parameters()]
    return [_kind(block) for block in blocks] if len(set(owned)) == len(owned) else []


def _kind(block: nn.Module) -> _Kind:
    modules = tuple((path, *_own(child)) for path, child in block.named_modules())
    parts = (type(child).__name__ for child in block.children() if next(child.children(), None) is not None)
    name = f"{type(block).__name__} ({', '.join(parts)})"
    return _Kind(name, sum(each.numel() for each in block.parameters()), modules)


def _own(module: nn.Module) -> tuple[Any, ...]:
    """Class, shapes and plain attributes of one module, but for those that say where it is."""
    shapes = tuple((name, tuple(each.shape)) for name, each in module.named_parameters(recurse=False))
    plain = (
        (name, repr(value))
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
        and not (name.startswith("_") or "layers" in name or OWN_INDEX.search(name))
    )
    return type(module), shapes, tuple(sorted(plain))


def _first(kind: _Kind, places: Sequence[int], fewest: int) -> Sequence[int]:
    """The blocks of one kind that the first model has."""
    return places[: fewest or max(2, ceil(LOOKS_AHEAD / max(1, kind.size)))]


def _places(kinds: Sequence[_Kind]) -> dict[_Kind, list[int]]:
    places: dict[_Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        places.setdefault(kind, []).append(place)
    return places


def _picked(kinds: Sequence[_Kind], fewest: int) -> list[_Model]:
    """The first blocks of each kind, whatever lies between them."""
    places = _places(kinds)
    first = {kind: _first(kind, those, fewest) for kind, those in places.items()}
    base = list(chain.from_iterable(first.values()))
    further = (
        _Model(tuple(sorted([*base, those[len(first[kind])]])), kind)
        for kind, those in places.items()
        if len(those) > len(first[kind])
    )
    return [_Model(tuple(sorted(base)), None), *further]


def _prefixes(kinds: Sequence[_Kind], fewest: int) -> list[_Model]:
    """The first blocks, of which a family that counts its layers can have any number."""
    places = _places(kinds)
    end = 1 + max(_first(kind, those, fewest)[-1] for kind, those in places.items())
    ends = sorted(
        next(place for place in those if place >= end) for those in places.values() if those[-1] >= end
    )
    return [_Model(tuple(range(end)), None), *(_Model(tuple(range(last + 1)), kinds[last]) for last in ends)]


def _smaller(config: Any, layers: Sequence[int], kinds: Sequence[_Kind]) -> Any:
    """The config of a model with some of the blocks; None where it builds others."""
    try:
        made = shortened(config, layers)
        module = empty_model(made, torch.bfloat16, "")
    except ValueError:
        return None
    return made if _kinds(module, made) == [kinds[place] for place in layers] else None


def _weights(kinds: Sequence[_Kind], models: Sequence[_Model]) -> list[int]:
    """How often each model counts, so that there are as many blocks of every kind as in the whole model.

    Beside the one block of its own kind, a model may have more of the kinds that come before.
    """
    base = Counter(kinds[place] for place in models[0].layers)
    missing = Counter(kinds)
    missing.subtract(base)
    weights: list[int] = []
    for model in reversed(models[1:]):
        weight = missing[model.kind]
        has = Counter(kinds[place] for place in model.layers)
        for kind in missing:
            missing[kind] -= weight * (has[kind] - base[kind])
        weights.insert(0, weight)
    return [1 - sum(weights), *weights]
