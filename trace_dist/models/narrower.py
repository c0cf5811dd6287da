"""A narrower copy of a model: which part of each tensor is kept, and the config that says so.

What the narrower config builds is compared with what is kept, tensor by tensor, so that a family that is not known well enough is
refused rather than cut into another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from trace_dist.models.architecture import cause
from trace_dist.models.axes import axes_of
from trace_dist.models.depth import refusal
from trace_dist.models.heads import head_rows
from trace_dist.models.origin import Origin
from trace_dist.models.roles import ParamInfo, Role, describe
from trace_dist.models.weight_files import WeightFiles
from trace_dist.models.width import (
    Heads,
    Widths,
    best,
    channel_importance,
    kept_heads,
    narrowed,
    neuron_importance,
)


class Narrower:
    """What is kept of the width of a model's layers.

    Args:
        config: of the target.
        model: the target without storage.
        files: its tensors.
        pieces: parameter -> tensors of the files.
        origin: with the layers that are kept.
        widths: how much of them.

    Raises:
        ValueError: more than there is, or a family whose layers are not known well enough.
    """

    def __init__(
        self,
        config: Any,
        model: Any,
        files: WeightFiles,
        pieces: Mapping[str, list[str]],
        origin: Origin,
        widths: Widths,
    ) -> None:
        self._whole, self._files, self._widths = config, files, widths
        self._infos = {name: info for name, info in describe(model).items() if name in pieces}
        fused = next((name for name in self._infos if len(pieces[name]) != 1), None)
        if fused is not None:
            raise ValueError(_refusal(config, f"{fused} is made of several tensors"))
        self._stored = {name: pieces[name][0] for name in self._infos}
        self._layers = self._by_role(origin)
        text = config.get_text_config()
        self._hidden = _size(config, text, "hidden_size")
        self._rows = self._head_rows(model)
        self._heads = self._cut_heads(text)
        self.origin = self._choose(origin, text)

    def _read(self, name: str) -> Tensor:
        return self._files.tensor(self._stored[name])

    def _by_role(self, origin: Origin) -> list[dict[Role, str]]:
        """Role -> matrix, of each layer that is kept."""
        found: list[dict[Role, str]] = [{} for _ in origin.layers]
        for name, info in self._infos.items():
            layer = origin.layer(name)
            if layer is not None and layer in origin.layers and len(info.shape) == 2 and info.role != "other":
                of_layer = found[list(origin.layers).index(layer)]
                if info.role in of_layer:
                    raise ValueError(_refusal(self._whole, f"a layer has several weights such as {name}"))
                of_layer[info.role] = name
        return found

    def _head_rows(self, model: Any) -> dict[str, int]:
        if self._widths.heads is None and self._widths.hidden is None:
            return {}
        found: dict[str, int] = {}
        for role in ("q", "k", "v"):
            name = self._matrix(0, role)
            try:
                rows = head_rows(model, self._infos[name])
            except ValueError as error:
                raise ValueError(_refusal(self._whole, f"{name} has heads of an unknown size")) from error
            if rows is None:
                raise AssertionError(f"{name}: has no heads")
            found[role] = rows
        return found

    def _matrix(self, layer: int, role: Role) -> str:
        name = self._layers[layer].get(role)
        if name is None:
            raise ValueError(_refusal(self._whole, f"its layers have no {role} weight of their own"))
        return name

    def _cut_heads(self, text: Any) -> Heads | None:
        if self._widths.heads is None:
            return None
        infos = {role: self._infos[self._matrix(0, role)] for role in ("q", "k")}  # type: ignore[arg-type]
        queries, keys = (infos[role].shape[0] // self._rows[role] for role in ("q", "k"))
        return Heads.cut(queries, keys, self._widths.heads)

    def _choose(self, origin: Origin, text: Any) -> Origin:
        widths, layers = self._widths, range(len(origin.layers))
        hidden = heads = neurons = None
        if widths.hidden is not None:
            _within("keep_hidden", widths.hidden, self._hidden)
            hidden = best(channel_importance(self._infos, self._read, self._hidden), widths.hidden)
        if self._heads is not None:
            for layer, role in ((layer, role) for layer in layers for role in ("q", "k", "v", "o")):
                self._matrix(layer, role)  # type: ignore[arg-type]
            heads = [kept_heads(of, self._read, self._heads, self._rows) for of in self._layers]
        if widths.intermediate is not None:
            _within("keep_intermediate", widths.intermediate, _size(self._whole, text, "intermediate_size"))
            for layer, role in ((layer, role) for layer in layers for role in ("up", "down")):
                self._matrix(layer, role)  # type: ignore[arg-type]
            neurons = [best(neuron_importance(of, self._read), widths.intermediate) for of in self._layers]
        return replace(
            origin,
            hidden=hidden,
            heads=None if heads is None else [queries for queries, _ in heads],
            kv_heads=None if heads is None else [keys for _, keys in heads],
            intermediate=neurons,
            head_rows=self._rows,
        )

    def config(self, shorter: Any) -> Any:
        """The copy's config, from one with its layers."""
        text = shorter.get_text_config()
        values = {**text.to_dict(), **narrowed(text, self._widths, self._heads, self._rows)}
        if text is not shorter:
            (section,) = (name for name in shorter.sub_configs if getattr(shorter, name) is text)
            values = {**shorter.to_dict(), section: values}
        try:
            return type(shorter).from_dict(values)
        # Hundreds of families check their configs, each in its own way.
        except Exception as error:
            raise ValueError(
                _refusal(self._whole, f"its config takes no such widths: {cause(error)}")
            ) from error

    def reader(
        self, build: Callable[[Any], Any], config: Any, names: Mapping[str, str]
    ) -> Callable[[str], Tensor]:
        """Stored tensor of the target -> the part of it that is kept. Raises ValueError where the copy wants others."""
        copy = describe(self._built(build, config))
        parameter_of, origin = {stored: name for name, stored in self._stored.items()}, self.origin
        place = {layer: index for index, layer in enumerate(origin.layers)}
        cuts: dict[str, list[Tensor | None]] = {}
        for old in names.values():
            name = parameter_of.get(old)
            if name is None:
                continue
            layer = origin.layer(name)
            new = name if layer is None else origin.moved(name, place[layer])
            if new not in copy:
                raise ValueError(_refusal(self._whole, f"the copy has no {new}"))
            cuts[old] = self._cut(self._infos[name], copy[new], new)
        return partial(_part, self._files, cuts)

    def _built(self, build: Callable[[Any], Any], config: Any) -> Any:
        try:
            return build(config)
        except ValueError as error:
            raise ValueError(_refusal(self._whole, f"no such model can be built: {error}")) from error

    def _cut(self, info: ParamInfo, copy: ParamInfo, name: str) -> list[Tensor | None]:
        """The indices of each dimension that are kept; the sizes must be those that the copy has."""
        for dim, axis in enumerate(axes_of(name, len(copy.shape))):
            kept = None if axis is None else self.origin.kept(axis, name)
            # What is as long as something else than the residual stream does not run over its channels.
            known = axis != "hidden" or info.shape[dim] == self._hidden
            if kept is not None and (len(kept) == copy.shape[dim]) != known:
                why = f"which part of {info.name}, {list(info.shape)}, the copy's {list(copy.shape)} is, is not known"
                raise ValueError(_refusal(self._whole, why))
        places = self.origin.places(name, copy.shape)
        sizes = tuple(
            size if each is None else len(each) for size, each in zip(info.shape, places, strict=True)
        )
        if sizes != copy.shape:
            raise ValueError(
                _refusal(
                    self._whole, f"{info.name} is {list(info.shape)}, and no part of it is {list(copy.shape)}"
                )
            )
        return places


def _part(files: WeightFiles, cuts: Mapping[str, list[Tensor | None]], stored: str) -> Tensor:
    tensor = files.tensor(stored)
    for dim, places in enumerate(cuts.get(stored, [])):
        tensor = tensor if places is None else tensor.index_select(dim, places)
    return tensor.contiguous()


def _size(config: Any, text: Any, name: str) -> int:
    size = getattr(text, name, None)
    if type(size) is not int:
        raise ValueError(_refusal(config, f"its config has no one {name}"))
    return size


def _within(field: str, kept: int, size: int) -> None:
    if kept > size:
        raise ValueError(f"prune.{field}={kept}: the model has {size}; keep 1 to {size}")


def _refusal(config: Any, why: str) -> str:
    return refusal(
        config, f"cannot be made narrower: {why}; leave keep_hidden, keep_heads and keep_intermediate out"
    )
