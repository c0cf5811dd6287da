"""The seam between training and the library that shards the model.

A backend answers three questions about each parameter: which slice of the row-major flattened tensor every rank owns
(``views``), where this rank's slice lies in memory (``local``), and how gathered copies are made to agree after that slice
was changed in place (``refresh``). Everything above (gradients, optimizer, deltas, checkpoints) is written once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from trace_kernels.runs import Runs

from trace_dist.config import Quantize
from trace_dist.masks.mask import Mask
from trace_dist.models.nf4 import NF4Linear, named_weights
from trace_dist.models.roles import full_shape
from trace_dist.models.wrapping import peel, plain_name
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.compaction import Compactor, supports_of
from trace_dist.sharding.overlay import Overlay, union
from trace_dist.sharding.overlay_gathers import OverlayGathers
from trace_dist.sharding.saving import check_can_be_saved, write_pretrained
from trace_dist.sharding.support import Accumulate, Support
from trace_dist.sharding.views import PartitionView
from trace_dist.utils import dist
from trace_dist.utils.files import check_folder
from trace_dist.utils.together import on_main

if TYPE_CHECKING:
    from trace_dist.sharding.sequence import SequenceParallel


_VIEWS: WeakKeyDictionary[nn.Module, ref[ShardedModel]] = WeakKeyDictionary()
"""Model -> its latest view. What an attached mask leaves in the model keeps the view alive."""


def _latest(module: nn.Module) -> ShardedModel | None:
    reference = _VIEWS.get(module)
    return None if reference is None else reference()


def _others(view: ShardedModel) -> list[ShardedModel]:
    """The views of all other models with an attached mask; one may be a part of this one, or hold it."""
    found = [reference() for reference in list(_VIEWS.values())]
    return [other for other in found if other is not None and other is not view and other.masked()]


_Slot = tuple[nn.Module, str, str, Any]


def _slots(module: nn.Module) -> list[_Slot]:
    """Where each part and parameter of a module lies: (its owner, which dictionary of it, key, itself)."""
    return [
        (part, kind, key, value)
        for part in module.modules()
        for kind in ("_modules", "_parameters")
        for key, value in getattr(part, kind).items()
    ]


def view_of(layers: list[nn.Module]) -> ShardedModel | None:
    """The view that was made of a model before, frozen but for an attached mask; None where a new one would differ.

    Args:
        layers: the model and what wraps it (``models.wrapping.peel``).
    """
    view = _latest(layers[-1])
    if view is None or not view.still_fits(layers):
        return None
    view.freeze()
    return view


class ShardedModel(ABC):
    """A causal LM whose parameters are spread over the ranks of this job.

    Calling it runs the forward pass, through what wraps the model. Every weight is frozen; ``attach(mask)`` makes the masked
    entries, and only those, receive gradients.
    """

    backend: str
    reduces_hooked_gradients = False
    """Whether a gradient that a hook catches is this rank's slice, already averaged over ranks."""
    weights_in_sight = False
    """Whether the model has its whole parameters at all times, so that a loss may depend on a weight beside its layer."""

    def __init__(self, module: nn.Module) -> None:
        self.roots = peel(module)
        """What wraps the model, from outside, and the model, then the caller's engine: each may be asked to reset gradients."""
        self.module: Any = self.roots[-1]
        self.comm = Comm()
        self.rank, self.world = self.comm.rank, self.comm.world
        self.sequence: SequenceParallel | None = None
        """How ranks share rows; None where each reads rows of its own."""
        self._compactor: Compactor | None = None
        self._take_over()
        self.freeze()
        self._parameters: dict[str, Any] = self._named_parameters()
        self._slots: list[_Slot] = []
        """What lay where when nothing was replaced: names are looked up again only where something else does."""
        self._shapes = {name: full_shape(parameter) for name, parameter in self._parameters.items()}
        self._quantized = {name: w for name, w in named_weights(self.module) if isinstance(w, NF4Linear)}
        self._overlays = OverlayGathers(self.module, self._quantized)

    def _take_over(self) -> None:
        """Become the view of the model: a mask that was attached through another would take the gradients of the next."""
        earlier = _latest(self.module)
        if earlier is not None:
            earlier.detach()
        _VIEWS[self.module] = ref(self)

    def _let_go(self) -> None:
        """Be no longer the view of the model."""
        _VIEWS.pop(self.module, None)

    def freeze(self) -> None:
        """Freeze every weight, unless a mask is attached; what another view trains, of a part of the model, stays as it is."""
        if self._compactor is None:
            trained = {parameter for other in _others(self) for parameter in other.masked()}
            for parameter in set(self.module.parameters()) - trained:
                parameter.requires_grad_(False)

    def masked(self) -> list[Any]:
        """The parameters that hold what the attached mask covers."""
        supports = [] if self._compactor is None else self._compactor.supports
        return [self._parameters[part] for support in supports for part in self._kept_as(support.name)]

    def still_fits(self, layers: list[nn.Module]) -> bool:
        """Whether this is what a new view would be: the same lies around the model, and its parameters have not been replaced."""
        same_names = self._named_parameters().keys() == self._parameters.keys()
        return self.roots == layers and same_names and not self.replaced()

    def replaced(self) -> list[str]:
        """Parameters that the model no longer has, or has anew or in another shape: what is known of them here is wrong."""
        if self._slots and all(
            getattr(part, kind).get(key) is value for part, kind, key, value in self._slots
        ):
            now = self._parameters
        else:  # or somebody has put a wrapper in between
            now = self._named_parameters()
        found = [
            name
            for name, parameter in self._parameters.items()
            if full_shape(parameter) != self._shapes[name] or now.get(name) is not parameter
        ]
        if now is not self._parameters:
            self._slots = [] if found else _slots(self.module)
        return found

    def check_current(self) -> None:
        """Raise ValueError where the model no longer holds a parameter as it is known here: it would be read, or written, where
        nobody looks."""
        # Adapters that were put around a layer change its name alone.
        held = {id(parameter) for parameter in self.module.parameters()}
        for name in self.replaced():
            parameter = self._parameters[name]
            if id(parameter) not in held or full_shape(parameter) != self._shapes[name]:
                raise ValueError(
                    f"model: {name!r} was replaced since the model was sharded, as resize_token_embeddings and "
                    "load_state_dict(assign=True) do; call shard() again"
                )

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype, quantize: Quantize = "none") -> ShardedModel:
        """Load a checkpoint; where there are several ranks none holds more than its own shard. Collective."""

    @abstractmethod
    def views(self, name: str) -> list[PartitionView]:
        """What every rank owns of a parameter, in rank order; together they tile it."""

    @abstractmethod
    def local(self, name: str) -> Tensor:
        """This rank's slice, 1-D, sharing storage with the model: writes to it change the model. An NF4 weight has none."""

    @abstractmethod
    def refresh(self, supports: Iterable[Support]) -> None:
        """Make gathered copies agree with slices whose masked entries were changed in place. Collective."""

    @abstractmethod
    def gathered(self, parameters: list[Any]) -> AbstractContextManager[list[Tensor]]:
        """Parameters as a whole, on every rank, inside the block. Collective."""

    def share_rows(self, size: int) -> None:
        """Let every ``size`` ranks, one after another, share rows (sharding/sequence.py). Collective.

        Raises:
            ValueError: the ranks or the attention heads cannot be divided so, the model's attention cannot be replaced, or
                another number of ranks shares rows already.
        """
        now = 1 if self.sequence is None else self.sequence.size
        if size == now:
            return
        if now > 1:
            raise ValueError(f"sequence_parallel={size}: the model was sharded with {now}; load it anew")
        # It brings models and data, which whoever opens a bank does without.
        from trace_dist.sharding.sequence import SequenceParallel

        self.sequence = SequenceParallel(self.module, size, self.comm)

    def indices_may_leave(self, name: str) -> bool:
        """Whether nothing but a backward pass needs to know where the masked entries of other ranks are in a weight."""
        return False

    def after_backward(self) -> None:  # noqa: B027 - backends without leftovers need nothing here
        """Called at the end of each backward pass. Collective."""

    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        return self.module.config

    @property
    def quantize(self) -> Quantize:
        """How its linear layers are kept."""
        return "nf4" if self._quantized else "none"

    @property
    def dtype(self) -> torch.dtype:
        """That it was loaded in: the narrowest of its weights', since some families keep a few in fp32."""
        found = {self.like(name).dtype for name in self.names()}
        return min((dtype for dtype in found if dtype.is_floating_point), key=lambda dtype: dtype.itemsize)

    @property
    def device(self) -> torch.device:
        return dist.local_device()

    def _named_parameters(self) -> dict[str, Any]:
        """What the library holds, the words of NF4 weights included, by the names without wrappers."""
        return {plain_name(name): parameter for name, parameter in self.module.named_parameters()}

    def names(self) -> list[str]:
        """Parameter names without wrappers, tied parameters once; an NF4 layer has its logical weight (models/nf4.py)."""
        return [name for name, _ in named_weights(self.module)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of a parameter."""
        return full_shape(self._quantized[name] if name in self._quantized else self._parameters[name])

    def _kept_as(self, name: str) -> list[str]:
        """The parameters that hold a weight: itself, or the words of an NF4 weight."""
        if name not in self._quantized:
            return [name]
        layer = name.removesuffix("weight")
        return [f"{layer}packed", f"{layer}absmax"]

    def dense(self, supports: Iterable[Support]) -> list[Support]:
        """The supports of weights that are not quantised: only those can have gathered copies that grow stale."""
        return [support for support in supports if support.name not in self._quantized]

    def dtype_of(self, name: str) -> torch.dtype:
        """In which a weight, or the words of an NF4 weight, is kept at this moment."""
        kept: torch.dtype = self._parameters[self._kept_as(name)[0]].dtype
        return kept

    def like(self, name: str) -> Tensor:
        """An empty tensor of the dtype of a weight's values, on the device where this rank keeps them."""
        return self.local(self._kept_as(name)[0])[:0]

    def held(self) -> list[Tensor]:
        """All that this rank keeps of the weights between steps."""
        return [*map(self.local, self._parameters), *(overlay.values for overlay in self.overlays())]

    def copies(self) -> list[Tensor]:
        """Gathered copies of weights that are there at this moment, beside what this rank owns."""
        return []

    def overlays(self) -> list[Overlay]:
        """Those of NF4 weights that have one."""
        return [layer.overlay for layer in self._quantized.values() if layer.overlay is not None]

    @contextmanager
    def whole(self, name: str) -> Iterator[Tensor]:
        """All present values of a weight, on every rank, inside the block. Collective."""
        with self.gathered([self._parameters[part] for part in self._kept_as(name)]) as tensors:
            yield self._quantized[name].present(*tensors) if name in self._quantized else tensors[0]

    def full_parameter(self, name: str) -> Tensor | None:
        """A whole weight on the CPU of rank 0 (None elsewhere). Collective."""
        with self.whole(name) as full:
            return full.detach().cpu().clone() if self.rank == 0 else None

    def values(self, name: str) -> Tensor:
        """This rank's slice of the present values, for reading: ``local``, or a copy for an NF4 weight. Collective."""
        if name not in self._quantized:
            return self.local(name)
        view = self.views(name)[self.rank]
        with self.whole(name) as full:
            return full.view(-1)[view.start : view.stop].clone()

    def storage(self, support: Support) -> tuple[Tensor, Runs]:
        """Where the values of a support lie: a 1-D tensor and the entries in it; writes to them change the model. Collective.

        Of an NF4 weight that is its overlay ([Note: overlay] in sharding/overlay.py), which is another one once other masks have
        been used: ask anew each time.
        """
        name = support.name
        if name not in self._quantized:
            return self.local(name), support.runs
        layer = self._quantized[name]
        if layer.overlay is None or layer.overlay.find(support) is None:
            entries = support.whole()
            if layer.overlay is not None:
                entries = union(layer.overlay.whole(), entries)
            with self.whole(name) as full:
                layer.overlay = self._overlay(name, entries, full)
        self._overlays.forget()
        return layer.overlay.values, layer.overlay.find(support)

    def stored(self, support: Support) -> tuple[Tensor, Runs]:
        """As ``storage``, for reading alone. Once that was called, one rank or another thread may call this: gathers of overlays
        that are under way stay."""
        layer = self._quantized.get(support.name)
        found = None if layer is None or layer.overlay is None else layer.overlay.find(support)
        if layer is None or layer.overlay is None or found is None:
            return self.storage(support)
        return layer.overlay.values, found

    def places(self, supports: Iterable[Support]) -> list[int] | None:
        """Addresses of what ``storage`` gives: while they stay it gives the same. None with NF4 weights, where it may not."""
        if self._quantized:
            return None
        return [self.local(support.name).data_ptr() for support in supports]

    def stamp(self, name: str) -> tuple[int, int]:
        """Another one once a dense weight was written to or replaced, as by ``load_state_dict``; ``local`` does not count."""
        parameter = self._parameters[name]
        return parameter._version, parameter.data_ptr()

    def release(self) -> None:
        """Drop the overlays of NF4 weights that hold what the codes say, as after a delta was taken off. Collective."""
        for name, layer in self._quantized.items():
            overlay, layer.overlay = layer.overlay, None
            if overlay is not None:
                with self.whole(name) as base:
                    said = self._overlay(name, overlay.whole(), base)
                differs = not torch.equal(overlay.values, said.values)
                if self.comm.max(torch.tensor(differs, dtype=torch.int32, device=self.device)):
                    layer.overlay = overlay
        self._overlays.forget()

    def _overlay(self, name: str, entries: Runs, dense: Tensor) -> Overlay:
        gather = partial(self._overlays.values, name)
        return Overlay(entries, self.views(name), dense.view(-1), self.comm, gather)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.roots[0](*args, **kwargs)

    def __deepcopy__(self, _: Any) -> NoReturn:
        # The copy would go on with this one's hooks and buffers.
        raise ValueError("copy: a sharded model cannot be copied; shard a copy of the plain model instead")

    def __reduce__(self) -> NoReturn:
        raise ValueError(
            "copy: a sharded model cannot be pickled; save it with save_pretrained, or what was trained as a delta"
        )

    def train(self, mode: bool = True) -> ShardedModel:
        self.module.train(mode)
        return self

    def eval(self) -> ShardedModel:
        return self.train(False)

    def attach(self, mask: Mask, accumulate: Accumulate | None = None) -> list[Support]:
        """Route gradients of the mask's entries into compact buffers; replaces a mask attached before, and one of a part of the
        model, or of what holds it, that covers the same parameters.

        Args:
            mask: which entries.
            accumulate: takes each reduced gradient instead of the supports' buffers, which then hold nothing.

        Returns:
            One support per masked parameter, in the model's order; ``grad`` is its compact gradient, [entries on this rank] fp32.

        Raises:
            ValueError: the mask is of another model, or the ranks hold different masks; the mask attached before stays.
        """
        supports = supports_of(self, mask)
        kept = {self._parameters[part] for support in supports for part in self._kept_as(support.name)}
        for other in _others(self):
            if not kept.isdisjoint(other.masked()):
                other.detach()
        self.detach()
        self.release()
        self._compactor = Compactor(self, mask, supports, accumulate)
        return self._compactor.supports

    def detach(self) -> None:
        """Stop collecting gradients."""
        if self._compactor is not None:
            self._compactor.close()
            self._compactor = None

    def index_shares(self) -> list[Tensor]:
        """This rank's part of the attached mask's indices, where they are shared out."""
        return [] if self._compactor is None else self._compactor.indices.tensors()

    def is_attached(self, supports: list[Support]) -> bool:
        """Whether these supports, from ``attach``, still receive gradients."""
        return self._compactor is not None and self._compactor.supports is supports

    def zero_grad(self) -> None:
        """Reset the compact gradients of the attached mask."""
        if self._compactor is not None:
            self._compactor.zero_grad()

    def mark_gradients_spent(self) -> None:
        """The compact gradients have been used: the next backward pass begins from zero."""
        if self._compactor is not None:
            self._compactor.mark_spent()

    def has_unreduced_gradients(self) -> bool:
        """Whether a backward pass was cut short, by an error, before its gradients were exchanged."""
        return self._compactor is not None and self._compactor.has_unreduced

    def ranks_not_finite(self) -> list[int]:
        """The ranks whose own gradient since the last ``zero_grad`` is infinite or NaN at some masked entry, as far as the engine
        exchanges it; none where the sharding library does. Collective."""
        mine = [] if self._compactor is None else self._compactor.senders_not_finite()
        return sorted(set().union(*self.comm.objects(mine)))

    def backward(self, loss: Tensor, reduction: Literal["mean", "sum"] = "mean") -> None:
        """Backward pass; adds the gradients of all ranks, on the mask's entries only, to the compact buffers. Collective.

        ``loss.backward()`` does the same with ``mean``, where every rank's loss depends on some masked entry.

        Args:
            loss: scalar of this rank.
            reduction: ``mean`` averages the ranks' losses, as data-parallel training does; ``sum`` adds them.

        Raises:
            ValueError: no mask is attached, no rank's loss depends on a masked entry, or the reduction is unknown.
        """
        if self._compactor is None:
            raise ValueError("backward: no mask is attached; build MaskedAdamW(sharded, mask, ...) first")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"backward: reduction={reduction!r}: unknown; use 'mean' or 'sum'")
        self._compactor.run_backward(loss, 1.0 / self.world if reduction == "mean" else 1.0)

    def full_state_dict(self) -> dict[str, Tensor]:
        """On rank 0 the whole model on the CPU under plain Hugging Face names (tied names share one tensor); elsewhere empty.

        Collective.

        Raises:
            ValueError: a parameter was replaced, or added, since the model was sharded.
        """
        self.check_current()
        added = self._named_parameters().keys() - self._parameters.keys()
        if added:
            raise ValueError(
                f"model: {min(added)!r} came after the model was sharded, as where tied weights are untied; call shard() again"
            )
        state: dict[str, Tensor] = {}
        by_id: dict[int, str] = {}
        for name, weight in named_weights(self.module, remove_duplicate=False):
            if id(weight) not in by_id:
                by_id[id(weight)] = name
                full = self.full_parameter(name)
                if full is not None:
                    state[name] = full
            elif self.rank == 0:
                state[name] = state[by_id[id(weight)]]
        persistent = self.module.state_dict()  # on every rank: FSDP2 drops its gathered copies here
        if self.rank == 0:
            buffers = {k: v for k, v in self.module.named_buffers() if k in persistent}
            state |= {plain_name(name): buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        return state

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the whole model as an ordinary Hugging Face checkpoint, from rank 0. Collective.

        Raises:
            ValueError: the model holds PEFT adapters, or the folder cannot be written, and what lay in it is then still there. It
                is tried before weights are gathered.
        """
        check_can_be_saved(self.module)
        on_main(lambda: check_folder(Path(folder)))
        state = self.full_state_dict()
        on_main(lambda: write_pretrained(self.module, state, Path(folder)))
