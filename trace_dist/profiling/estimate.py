"""Memory of masked training on one rank, from a model's config alone: no weights, no ranks, no accelerator.

    peak = states + max over the moments of a step of (gathered + weight gradient + reduction + activations + logits)

States follow from shapes (docs/how-it-works.md, "Memory"), activations from running the module on the meta device
(``activations``), gathered parameters from how the backend fetches them (``gathering``). Two things exist at one moment of each
masked linear layer's backward pass: the gradient of its weight (dense for scattered masks, the masked rows or columns else), and
compact gradients that wait for their exchange with the buffers of that exchange (``sharding.reduction``). The optimizer works in
small chunks on what lies there between steps, so its own moment never is the peak.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from trace_dist.config import Backend, Quantize
from trace_dist.config.checks import check_ranks
from trace_dist.data.slices import slice_length
from trace_dist.masks.layouts import layouts_for
from trace_dist.masks.units import UnitLayout
from trace_dist.models.architecture import cause, empty_model, factory_of, read_config
from trace_dist.models.blocks import decoder_blocks
from trace_dist.models.nf4 import NF4Linear, named_weights, quantize_nf4
from trace_dist.models.quantised import refuse_quantised_sections
from trace_dist.models.roles import full_shape
from trace_dist.profiling.activations import Moment, StepTrace, trace_step
from trace_dist.profiling.exchange import Exchange
from trace_dist.profiling.gathering import fsdp2_gathered, zero3_gathered
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.selection import (
    Selection,
    all_index_bytes,
    decoded_bytes,
    formed_elements,
    moment_bytes,
    overlay_index_bytes,
    own_index_bytes,
    selections,
)
from trace_dist.sharding.compaction import linear_modules
from trace_dist.sharding.index_shares import share_bytes, worth_sharing
from trace_dist.sharding.sequence import check_divisible
from trace_dist.sharding.views import chunk_views
from trace_dist.utils.home import from_home

STATES = ("weights", "master", "exp_avg", "exp_avg_sq", "gradients", "indices", "staging")
TRANSIENT = ("gathered", "weight_gradient", "reduction", "activations", "logits")


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank (the first, which never holds less than the others).

    Attributes:
        states: what lies there between steps, by category.
        transient: the most of each category during a step; they do not all peak together.
        between: what lies there between forward and backward: saved activations, gathered weights.
        peak: the most at one moment, states included.
        peak_parts: what that is made of.
        peak_where: when it is.
        host: host memory beside the device's, by category (``offload``, ``keep_best``, ``checkpoint_async``).
        num_parameters: of the model.
        num_entries: masked entries of the model.
    """

    states: dict[str, int]
    transient: dict[str, int]
    between: dict[str, int]
    peak: int
    peak_parts: dict[str, int]
    peak_where: str
    host: dict[str, int]
    num_parameters: int
    num_entries: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def load_config(model: str) -> Any:
    """The transformers config of a model.

    Raises:
        ValueError: there is none, it is of weights that are not trained, as others have quantised them, or of no causal LM.
    """
    is_path = model.startswith((".", "~", "/")) or model.endswith(".json") or model.count("/") > 1
    path = from_home(model)
    if is_path and not path.exists():
        raise ValueError(
            f"model={model!r}: no such file or folder; give a config.json, a folder that holds one, or a hub id"
        )
    config = read_config(path if path.exists() else model, f"model={model!r}")
    refuse_quantised_sections(config.to_dict(), f"model={model!r}")
    if factory_of(config) is not AutoModelForCausalLM:
        raise ValueError(
            f"model={model!r}: a {config.architectures[0]} reads no tokens, and a step of it is not foreseen; "
            "name a causal LM, or measure a training step"
        )
    return config


class Estimator:
    """Estimates for one model; what several of them share is found once.

    Args:
        model: a config.json, a folder that holds one, or a hub id.
        dtype: of the weights.
        quantize: as ``MemorySetup.quantize``.
        config: its transformers config, where it is not read from ``model``.

    Raises:
        ValueError: the model has no readable config.
    """

    def __init__(
        self, model: str, dtype: str, quantize: Quantize = "none", config: Any | None = None
    ) -> None:
        self.model = model
        config = load_config(model) if config is None else config
        self.module = empty_model(config, getattr(torch, dtype), f"model={model!r}")
        if quantize == "nf4":
            quantize_nf4(self.module)
        self.weights = dict(named_weights(self.module))
        self.linears = linear_modules(self.module).keys()
        self.numel = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        self.itemsize = next(self.module.parameters()).element_size()
        self.layouts = lru_cache(None)(self._layouts)
        self.trace = lru_cache(None)(self._trace)
        self.gathered = lru_cache(None)(self._gathered)
        self.fullest = lru_cache(None)(self._fullest)

    def __call__(self, setup: MemorySetup) -> Estimate:
        """The memory of one setup.

        Raises:
            ValueError: nothing is maskable, the mask would select nothing, so many ranks cannot share rows, or the family's code
                does not run on the meta device.
        """
        if setup.sequence_parallel > 1:
            check_ranks(setup.world_size, setup.sequence_parallel)
            check_divisible(self.module.config, setup.sequence_parallel)
        layouts = self.layouts(setup.granularity, setup.block, setup.maskable)
        selected = selections(layouts, setup.density)
        if not selected:
            raise ValueError(f"density={setup.density}: not one unit is selected; raise it")
        indices = self._indices(setup, layouts, selected)
        states, host = self._states(setup, layouts, selected)
        states["indices"] += indices.kept
        columns = tuple(
            (name, chosen.units if layouts[name].stride > 1 else None) for name, chosen in selected.items()
        )
        step = _Step(
            columns,
            setup.micro_batch_size,
            max(2, slice_length(setup.sequence_length, setup.sequence_parallel)),
            setup.activation_checkpointing,
            setup.device,
        )
        gathered = self.gathered(step, setup.backend, setup.world_size, setup.device == "cpu")
        overlays = self._gathered_overlays(setup, selected)
        gathered = tuple(overlays + num_bytes for num_bytes in gathered)
        sizes = tuple(
            (
                name,
                formed_elements(layouts[name], chosen),
                chosen.entries,
                decoded_bytes(layouts[name], chosen, setup),
                indices.gathered.get(name, 0),
            )
            for name, chosen in selected.items()
        )
        transient, where, parts = self.fullest(self.trace(step), gathered, sizes, setup.world_size)
        return Estimate(
            states=states,
            transient=transient,
            between={
                "activations": self.trace(step).saved,
                "gathered": self._kept(step, setup.backend, gathered),
            },
            peak=sum(states.values()) + sum(parts.values()),
            peak_parts={**states, **parts},
            peak_where=where,
            host=host,
            num_parameters=sum(prod(full_shape(weight)) for weight in self.weights.values()),
            num_entries=sum(selection.entries for selection in selected.values()),
        )

    def _layouts(self, granularity: str, block: int, maskable: str) -> dict[str, UnitLayout]:
        return layouts_for(self.module, granularity, block, maskable)

    def _trace(self, step: _Step) -> StepTrace:
        columns, batch, length, checkpointing, device = step
        try:
            return trace_step(self.module, dict(columns), batch, length, checkpointing, device)
        # A family's code, which may need values, another length, other inputs than tokens or another dtype.
        except Exception as error:
            raise ValueError(
                f"model={self.model!r}: the memory of a step of the family {self.module.config.model_type!r} is not known before "
                f"one is run ({cause(error)}); change what it names, or measure a training step"
            ) from error

    def _gathered(self, step: _Step, backend: Backend, world_size: int, by_messages: bool) -> tuple[int, ...]:
        moments = self.trace(step).moments
        if backend == "single":
            return (0,) * len(moments)
        if backend == "zero3":
            elements = zero3_gathered(moments, self.numel, world_size, by_messages)
        else:
            elements = fsdp2_gathered(moments, self.numel, self._blocks)
        return tuple(self.itemsize * count for count in elements)

    def _gathered_overlays(self, setup: MemorySetup, selected: Mapping[str, Selection]) -> int:
        """Bytes of the gathered values over the 4-bit weights of two blocks in a row (``sharding.overlay_gathers``)."""
        sizes: dict[int | None, int] = {}
        for name, chosen in selected.items():
            if setup.world_size > 1 and isinstance(self.weights[name], NF4Linear):
                block = self._blocks[f"{name.removesuffix('weight')}packed"]
                sizes[block] = sizes.get(block, 0) + self.itemsize * chosen.entries
        each = list(sizes.values())
        return max((sum(each[i : i + 2]) for i in range(len(each))), default=0)

    def _kept(self, step: _Step, backend: Backend, gathered: tuple[int, ...]) -> int:
        """Bytes gathered between forward and backward: under FSDP2 the root's group, under ZeRO-3 what comes again soon."""
        if backend == "fsdp2":
            return self.itemsize * sum(
                self.numel[name] for name, block in self._blocks.items() if block is None
            )
        moments = self.trace(step).moments
        return gathered[max(i for i, moment in enumerate(moments) if "backward" not in moment.where)]

    @cached_property
    def _blocks(self) -> dict[str, int | None]:
        """Parameter -> the decoder block that holds it, as ``sharding.fsdp2`` wraps them."""
        blocks: dict[str, int | None] = dict.fromkeys(self.numel)
        for number, path in enumerate(decoder_blocks(self.module)):
            blocks |= {name: number for name in self.numel if name.startswith(f"{path}.")}
        return blocks

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the largest decoder block, gathered; 0 where the family names none."""
        sizes: dict[int, int] = {}
        for name, block in self._blocks.items():
            if block is not None:
                sizes[block] = sizes.get(block, 0) + self.itemsize * self.numel[name]
        return max(sizes.values(), default=0)

    def _stored(self, setup: MemorySetup, shape: tuple[int, ...]) -> int:
        """Elements of the first rank's shard of a parameter."""
        if setup.backend == "fsdp2":
            return len(chunk_views(shape, setup.world_size)[0])
        return -(-prod(shape) // setup.world_size)

    def _states(
        self, setup: MemorySetup, layouts: Mapping[str, UnitLayout], selected: Mapping[str, Selection]
    ) -> tuple[dict[str, int], dict[str, int]]:
        device, host = dict.fromkeys(STATES, 0), dict.fromkeys(STATES, 0)
        offloads = setup.offload == "cpu"
        place = host if offloads and setup.device != "cpu" else device
        device["weights"] = self.itemsize * sum(
            self._stored(setup, tuple(parameter.shape)) for parameter in self.module.parameters()
        )
        for name, selection in selected.items():
            weight = self.weights[name]
            shape = full_shape(weight)
            entries = round(selection.entries * self._stored(setup, shape) / max(prod(shape), 1))
            if isinstance(weight, NF4Linear):  # the overlay
                device["weights"] += self.itemsize * entries
                device["indices"] += overlay_index_bytes(layouts[name], selection)
            device["gradients"] += 4 * entries
            device["indices"] += own_index_bytes(layouts[name], selection, entries)
            place["master"] += 4 * entries * (setup.master and self.itemsize < 4)
            place["exp_avg"] += moment_bytes(entries, setup.state_dtype)
            place["exp_avg_sq"] += moment_bytes(entries, setup.state_dtype)
            if offloads:
                place["staging"] += sum(_pinned(size * entries, setup.device) for size in (self.itemsize, 4))
            copies = device if setup.device == "cpu" else host
            whole = entries * (4 if setup.master or self.itemsize == 4 else self.itemsize)
            best = whole * setup.keep_best
            if setup.keep_best:
                copies["best"] = copies.get("best", 0) + best
            if setup.checkpoint_async:
                copies["checkpoint"] = copies.get("checkpoint", 0) + best + _copied(setup, entries, whole)
        return device, host

    def _indices(
        self, setup: MemorySetup, layouts: Mapping[str, UnitLayout], selected: Mapping[str, Selection]
    ) -> _Indices:
        """Of all ranks' entries (``sharding.index_shares``)."""
        sizes = {name: all_index_bytes(layouts[name], chosen, setup) for name, chosen in selected.items()}
        if setup.backend == "fsdp2":  # it reduces the others itself
            sizes = {name: size for name, size in sizes.items() if name in self.linears}
        blocks: dict[int, list[str]] = {}
        for name in sizes:
            block = self._blocks.get(name)
            if (
                setup.backend != "single"
                and block is not None
                and not isinstance(self.weights[name], NF4Linear)
            ):
                blocks.setdefault(block, []).append(name)
        shared = {block: sum(sizes[name] for name in names) for block, names in blocks.items()}
        if not worth_sharing(max(shared.values(), default=0), setup.device):
            return _Indices(sum(sizes.values()), {})
        kept = sum(sizes.values()) - sum(shared.values())
        kept += sum(share_bytes(size, setup.world_size) for size in shared.values())
        # A block's, and those of the one that backward comes to next.
        there = {block: size + shared.get(block - 1, 0) for block, size in shared.items()}
        return _Indices(kept, {name: there[block] for block, names in blocks.items() for name in names})

    def _fullest(
        self,
        trace: StepTrace,
        gathered: tuple[int, ...],
        sizes: tuple[tuple[str, int, int, int, int], ...],
        world_size: int,
    ) -> tuple[dict[str, int], str, dict[str, int]]:
        """(most of each transient category, the fullest moment, its categories)."""
        exchange = Exchange(sizes, self.itemsize, world_size)
        most, best, where = dict.fromkeys(TRANSIENT, 0), dict.fromkeys(TRANSIENT, 0), ""
        for moment, gathered_bytes in zip(trace.moments, gathered, strict=True):
            for candidate in _candidates(moment, gathered_bytes, exchange):
                most = {name: max(most[name], candidate[name]) for name in TRANSIENT}
                if sum(candidate.values()) > sum(best.values()):
                    best, where = candidate, moment.where
        return most, where, best


class _Indices(NamedTuple):
    """Bytes of indices of all ranks' entries: what a rank keeps, and parameter -> what is gathered when its gradient comes."""

    kept: int
    gathered: dict[str, int]


class _Step(NamedTuple):
    """What activations depend on; masked columns per parameter, since of the input only those are kept."""

    columns: tuple[tuple[str, int | None], ...]
    micro_batch_size: int
    sequence_length: int
    activation_checkpointing: bool
    device: str


def _pinned(num_bytes: int, device: str) -> int:
    """Bytes that a buffer takes through which an accelerator and the host exchange: torch's allocator of pinned memory rounds up
    to a power of two (``c10/core/CachingHostAllocator.h``)."""
    return num_bytes if device == "cpu" or num_bytes == 0 else 1 << (num_bytes - 1).bit_length()


def _copied(setup: MemorySetup, entries: int, value_bytes: int) -> int:
    """Bytes of the copy of some entries' values and moments from which a checkpoint is written. Pinned is what comes from an
    accelerator: the values too, unless a master in host memory has them."""
    device = "cpu" if setup.offload == "cpu" else setup.device
    holder = device if setup.master else setup.device
    return _pinned(value_bytes, holder) + 2 * _pinned(moment_bytes(entries, setup.state_dtype), device)


def _candidates(moment: Moment, gathered: int, exchange: Exchange) -> list[dict[str, int]]:
    """What lies there at the fullest of a moment, and at the delivery of its weight gradient."""
    found = []
    if moment.delivers is not None and moment.at_delivery is not None:
        gradient, buffers = exchange.deliver(moment.delivers)
        found.append(
            {
                "gathered": gathered,
                "weight_gradient": gradient,
                "reduction": buffers,
                **{str(kind): size for kind, size in moment.at_delivery.items()},
            }
        )
    usual = {str(kind): size for kind, size in (moment.peak or {}).items()}
    base = {"gathered": gathered, "weight_gradient": 0, "reduction": exchange.held + exchange.indices}
    return [*found, {**base, "activations": 0, "logits": 0, **usual}]


def estimate(setup: MemorySetup) -> Estimate:
    """The memory of one setup.

    Raises:
        ValueError: the model has no readable config, or the mask would select nothing.
    """
    return Estimator(setup.model, setup.dtype, setup.quantize)(setup)
