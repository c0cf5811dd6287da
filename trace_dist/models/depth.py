"""The config of a model with fewer layers, and whether it builds the layers that were kept.

Families say in many ways which layer is of which kind: one value per layer, indices of special layers, how many come first or
last, a period and an offset. ``shortened`` rewrites those that it knows; ``check_layers`` builds both models without storage and
compares layer with layer, so that what it did not know is refused rather than pruned into another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trace_dist.models.architecture import cause
from trace_dist.models.roles import tower_of
from trace_dist.utils.meta_values import MetaValues

_PER_LAYER = re.compile(
    r"layer|block|pattern|_types$|window|intermediate_size|num_.*heads|head_dim|freq|rope"
)
_INDICES = re.compile(r"(indices|idxs?|_ids|layers)$")
# Layers before this one are, or are not, special.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
_LAST = ("num_kv_shared_layers",)
# Layers behind the last that predict further tokens: no part of a causal LM, and left out of its checkpoint.
_AHEAD = re.compile(r"^(num_nextn_predict_layers|num_mtp_\w*|mtp_num_\w*layers)$")
_PERIODS = (
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)
_STEPS = ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", "full_attention_interval")
# One value per layer, taken again and again until there are enough.
_CYCLES = ("block_types",)
_DERIVED = {"all_tied_weights_keys", "training"}
OWN_INDEX = re.compile(r"(layer|block)\w*(idx|index|id|number)$|^idx$")
"""Names of attributes that say which layer a module is of."""


def layer_list(model: nn.Module, config: Any) -> str | None:
    """Path of the list of decoder layers; None where there is no one such list."""
    found = [
        path
        for path, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == config.get_text_config().num_hidden_layers
    ]
    outermost = [
        path
        for path in found
        if tower_of(f"{path}.weight") == "text" and not any(map(str.isdecimal, path.split(".")))
    ]
    return outermost[0] if len(outermost) == 1 else None


def shortened(config: Any, kept: Sequence[int]) -> Any:
    """A config whose layers are those of ``config`` with the indices ``kept``.

    Raises:
        ValueError: the family does not allow such a config.
    """
    text = config.get_text_config()
    values = {
        name: _shorten(name, value, kept, text.num_hidden_layers)
        for name, value in text.to_dict().items()
        if not _is_computed(text, name)
    }
    _repeat(values, kept)
    values[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if text is not config:
        (section,) = (name for name in config.sub_configs if getattr(config, name) is text)
        values = {**config.to_dict(), section: values}
    try:
        return type(config).from_dict(values)
    # Hundreds of families check their configs, each in its own way.
    except Exception as error:
        raise ValueError(refusal(config, f"its config takes no such layers: {cause(error)}")) from error


def refusal(config: Any, why: str) -> str:
    """The error for a family that cannot be pruned."""
    return f"prune: {config.model_type}: {why}; use a smaller model of the family as the proxy"


def _is_computed(config: Any, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    return isinstance(attribute, property) and attribute.fset is None


def _shorten(name: str, value: Any, kept: Sequence[int], num_layers: int) -> Any:
    """One entry of a config, for the layers that stay."""
    if _AHEAD.match(name) and isinstance(value, int):
        return 0
    if name in _FIRST and type(value) is int:
        return sum(layer < value for layer in kept)
    if name in _LAST and type(value) is int:
        return sum(layer >= num_layers - value for layer in kept)
    if isinstance(value, list | tuple) and _INDICES.search(name) and _rises(value, num_layers):
        return [kept.index(layer) for layer in value if layer in kept]
    if name in _CYCLES and isinstance(value, list | tuple):
        return [value[layer % len(value)] for layer in kept]
    if _PER_LAYER.search(name):
        if isinstance(value, list | tuple) and len(value) == num_layers:
            return [value[layer] for layer in kept]
        if isinstance(value, str) and "pattern" in name and len(value) == num_layers:
            return "".join(value[layer] for layer in kept)
        if isinstance(value, dict) and value and all(str(key).isdecimal() for key in value):
            by_layer = {int(key): of_layer for key, of_layer in value.items()}
            return {kept.index(layer): of_layer for layer, of_layer in by_layer.items() if layer in kept}
    return value


def _rises(values: Sequence[Any], num_layers: int) -> bool:
    """Whether these are indices of layers, in order."""
    return all(type(value) is int and 0 <= value < num_layers for value in values) and all(
        a < b for a, b in pairwise(values)
    )


def _repeat(values: dict[str, Any], kept: Sequence[int]) -> None:
    """Find the periods with which the layers that stay are of the kinds that they were, in place; leave those that have none."""
    for period, offset in _PERIODS:
        if isinstance(values.get(period), int) and isinstance(values.get(offset), int):
            wanted = [layer % values[period] == values[offset] for layer in kept]
            ways = ((p, o) for p in range(1, len(kept) + 2) for o in range(p))
            fits = (way for way in ways if [layer % way[0] == way[1] for layer in range(len(kept))] == wanted)
            values[period], values[offset] = next(fits, (values[period], values[offset]))
    for step in _STEPS:
        if isinstance(values.get(step), int) and values[step] > 0:
            wanted = [(layer + 1) % values[step] == 0 for layer in kept]
            steps = (
                s
                for s in range(1, len(kept) + 2)
                if [(layer + 1) % s == 0 for layer in range(len(kept))] == wanted
            )
            values[step] = next(steps, values[step])


def check_layers(build: Callable[[Any], Any], old: Any, new: Any, kept: Sequence[int]) -> Any:
    """The model of the new config, if its layers are the kept ones of the old config's.

    Args:
        build: makes a model from a config, on the meta device.
        old: the config of all layers.
        new: from ``shortened``.
        kept: which layers of the old one the new one has.

    Raises:
        ValueError: something in a layer, or around them, is another.
    """
    with MetaValues() as values:
        before = build(old)
        try:
            after = build(new)
        except ValueError as error:
            raise ValueError(
                refusal(old, f"its config takes no such layers: {cause(error.__cause__ or error)}")
            ) from error
        stack = layer_list(before, old)
        if stack is None or layer_list(after, new) != stack:
            raise ValueError(refusal(old, "its layers are not one list"))
        compare = _Comparison(values, kept, old.get_text_config().num_hidden_layers)
        for layer, index in enumerate(kept):
            ours, theirs = (m.get_submodule(f"{stack}.{i}") for m, i in ((after, layer), (before, index)))
            for what in compare.modules(theirs, ours):
                raise ValueError(
                    refusal(
                        old,
                        f"builds layers by their index: layer {index} as layer {layer} has another {what}",
                    )
                )
        outside = (dict(_outside(model, stack)) for model in (before, after))
        for what in compare.named(*outside):
            raise ValueError(refusal(old, f"with {len(kept)} layers it has another {what}"))
    for name, values_of in _per_layer(old, compare.num_layers).items():
        expected = [values_of[index] for index in kept]
        if _per_layer(new, len(kept)).get(name, expected) != expected:
            raise ValueError(
                refusal(old, f"builds layers by their index: {name} of its config cannot be {expected}")
            )
    return after


def _outside(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    return ((path, child) for path, child in model.named_modules() if not path.startswith(f"{stack}."))


def _per_layer(config: Any, num_layers: int) -> dict[str, list[Any]]:
    """What a config says layer by layer, computed or not."""
    text = config.get_text_config()
    computed = [name for name in dir(type(text)) if isinstance(getattr(type(text), name, None), property)]
    found = {name: getattr(text, name, None) for name in (*vars(text), *computed) if _PER_LAYER.search(name)}
    return {
        name: list(value)
        for name, value in found.items()
        if isinstance(value, list | tuple) and len(value) == num_layers and not _INDICES.search(name)
    }


class _Comparison:
    """Of two modules that should compute the same, of two models of which the second has fewer layers."""

    def __init__(self, values: MetaValues, kept: Sequence[int], num_layers: int) -> None:
        self.values, self.kept, self.num_layers = values, kept, num_layers

    def modules(self, old: nn.Module, new: nn.Module) -> Iterator[str]:
        """What differs."""
        return self.named(dict(old.named_modules()), dict(new.named_modules()))

    def named(self, old: dict[str, nn.Module], new: dict[str, nn.Module]) -> Iterator[str]:
        """What differs, of modules by their paths."""
        yield from sorted(old.keys() ^ new.keys())
        for path, theirs in old.items():
            if path in new:
                ours = new[path]
                if type(ours) is not type(theirs):
                    yield f"{path or 'layer'} ({type(ours).__name__}, not {type(theirs).__name__})"
                yield from (f"{path}.{name}".lstrip(".") for name in self._own(theirs, ours))

    def _own(self, old: nn.Module, new: nn.Module) -> Iterator[str]:
        """Names of parameters, buffers and attributes of one module that differ."""
        tensors, others = (
            {**dict(m.named_parameters(recurse=False)), **dict(m.named_buffers(recurse=False))}
            for m in (old, new)
        )
        stored = old.state_dict(keep_vars=True)
        for name in sorted(tensors.keys() | others.keys()):
            if not self._same_tensor(tensors.get(name), others.get(name), name in stored):
                yield name
        attributes = vars(new)
        for name in vars(old).keys() & attributes.keys() - tensors.keys() - _DERIVED:
            if not name.startswith("_") and not self._same(name, vars(old)[name], attributes[name]):
                yield name

    def _same_tensor(self, old: Tensor | None, new: Tensor | None, stored: bool) -> bool:
        """Whether a parameter or buffer is the same; what files hold is copied, so that only its shape matters."""
        if new is None:
            # What is computed for a kind of layers may go with them.
            return not stored
        if old is None or old.shape != new.shape:
            return False
        theirs, ours = self.values.of(old), self.values.of(new)
        return stored or theirs is None or ours is None or torch.equal(theirs, ours)

    def _same(self, name: str, old: Any, new: Any) -> bool:
        """Whether an attribute says the same of a layer; objects are compared by what they hold elsewhere."""
        if OWN_INDEX.search(name) and type(old) is int and type(new) is int:
            return new < len(self.kept) and self.kept[new] == old
        if (old, new) == (self.num_layers, len(self.kept)):
            return True
        if isinstance(old, list | tuple) and isinstance(new, list | tuple):
            if len(old) == self.num_layers:
                return list(new) in ([old[layer] for layer in self.kept], list(old))
            # Such as the kinds of layers that there are.
            return list(new) == list(old) or (all(isinstance(x, str) for x in old) and set(new) <= set(old))
        if isinstance(old, dict) and isinstance(new, dict):
            return all(key in old and old[key] == value for key, value in new.items())
        plain = (bool, int, float, str, type(None), torch.dtype)
        return not (isinstance(old, plain) and isinstance(new, plain)) or old == new
