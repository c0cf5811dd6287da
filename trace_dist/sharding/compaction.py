"""Where gradients shrink to the mask: compact buffers, one per support, fed during the backward pass.

[Note: gradient path] All weights are frozen, so neither autograd nor the sharding library builds, keeps or reduces a dense
gradient. A masked linear layer runs through ``masked_linear``, which forms the gradient of that one weight, keeps its support and
frees the rest; for masks of whole rows or columns it computes those alone. Any other masked parameter (bias, norm,
embedding, fused experts) is unfrozen and caught by a post-accumulate hook; so is, where it lies whole on each rank, the weight
of a masked layer, for what a loss does with it beside the layer ([Note: weights in sight] in ``masked_linear``). Both hand this
rank's gradient at *all* masked entries of the parameter to the reducer, which exchanges them between ranks (``reduction``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from trace_kernels.compact import compact_gather

from trace_dist.masks.mask import Mask
from trace_dist.models.nf4 import NF4Linear
from trace_dist.models.wrapping import plain_name, refuse_data_parallel
from trace_dist.sharding.activation_checkpoints import ActivationCheckpoints
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.index_shares import IndexShares, blocks_of, worth_sharing
from trace_dist.sharding.masked_linear import MaskedLinear, RunningPass, patch_linear
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.sharding.support import Accumulate, Sharing, Support, add_to_grad, build_supports
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


class Attachable(Sharing, Protocol):
    """What a compactor must know of a sharded model (``sharding.base.ShardedModel``)."""

    module: Any
    roots: list[nn.Module]
    comm: Comm
    reduces_hooked_gradients: bool
    weights_in_sight: bool

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def after_backward(self) -> None:
        """Called at the end of each backward pass."""


def supports_of(model: Attachable, mask: Mask) -> list[Support]:
    """The supports of a mask for a ``Compactor``; nothing of the model is changed. Collective.

    Raises:
        ValueError: the mask is of another model, or the ranks hold different masks.
    """
    digests = model.comm.objects(mask.digest())
    if len(set(digests)) != 1:
        raise ValueError(
            f"mask: the ranks hold different masks ({digests}); load one mask file on every rank"
        )
    return build_supports(model, mask, _away(model, mask, linear_modules(model.module)))


class Compactor:
    """Catches gradients of one mask on one model until it is closed.

    Args:
        model: the model, without another mask.
        mask: which entries.
        supports: of the mask, from ``supports_of``.
        accumulate: as ``ShardedModel.attach``.
    """

    def __init__(
        self, model: Attachable, mask: Mask, supports: list[Support], accumulate: Accumulate | None = None
    ) -> None:
        linears = linear_modules(model.module)
        self.supports = supports
        if accumulate is None:
            for support in self.supports:
                support.grad = support.grad.new_zeros(support.runs.num_entries)
        self._accumulate = accumulate or add_to_grad
        self._model = model
        # What the sharding library reduces itself must not be waited for: no bucket behind it would ever leave.
        exchanged = [s for s in self.supports if s.name in linears or not model.reduces_hooked_gradients]
        self._reducer = CompactReducer(exchanged, self._accumulate, model.comm, model.device)
        leaving = [support for support in exchanged if support.away]
        self.indices = IndexShares(model.module, leaving, mask.units.gaps, model.comm, model.device)
        self._scale = self._mean = 1.0 / model.comm.world
        self._ended, self._spent, self._has_graph = True, False, True
        self._backward_pass = -1  # autograd's number of the pass whose end is awaited
        self._is_first = True
        self._undo: list[Callable[[], None]] = []
        self._hooked: dict[str, Callable[[Tensor], None]] = {}
        parameters = {plain_name(name): p for name, p in model.module.named_parameters()}
        self._undo += [_join_zero_grad(root, self.zero_grad) for root in model.roots]
        self._undo.append(_stay_whole(model.module))
        # Backward must reach the lowest masked layer even though its input needs no gradient.
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)
        self._anchor_node = get_gradient_edge(self._anchor).node
        checkpoints = ActivationCheckpoints(model.module)
        self._undo.append(model.module.register_forward_pre_hook(checkpoints).remove)
        running = RunningPass(model.module)
        self._undo.append(running.close)
        for support in self.supports:
            linear, parameter = linears.get(support.name), parameters.get(support.name)
            in_sight = parameter if linear is None or model.weights_in_sight else None
            if in_sight is not None:
                self._hook(in_sight, support)
            if linear is not None:
                sink = self._where_accumulated(self._sink(support))
                self._undo.append(patch_linear(linear, self._anchor, support.part, sink, running, in_sight))

    def _sink(self, support: Support) -> Callable[[Tensor], None]:
        """What a gradient source calls: with the dense gradient, or with the masked rows or columns of it."""

        def deliver(grad: Tensor) -> None:
            self._begin(support)
            flat = grad.reshape(-1)
            if flat.numel() not in (support.layout.numel, support.num_entries):
                raise ValueError(
                    f"backward: {support.name!r} was replaced in the model since the mask was attached, as "
                    "resize_token_embeddings does; build MaskedAdamW after that"
                )
            if flat.numel() != support.layout.numel:
                self._reducer.add(support, flat.to(support.grad.dtype) * self._scale)
            elif self._reducer.local_only and self._accumulate is add_to_grad:
                compact_gather(flat, support.runs, support.grad, scale=self._scale, accumulate=True)
            elif not self.indices.keep(support, flat, self._scale):
                self._reducer.add(support, support.pick(flat, self._scale))

        return deliver

    def _where_accumulated(self, deliver: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """``deliver``, but not from passes of ``torch.autograd.grad`` or ``backward(inputs=...)``, which accumulate no gradient
        of ours: hooks of parameters that are not asked for do not hear of them either."""

        def delivered(grad: Tensor) -> None:
            if torch._C._will_engine_execute_node(self._anchor_node):
                deliver(grad)

        return delivered

    def _deliver_slice(self, support: Support) -> Callable[[Tensor], None]:
        """Takes a gradient that the sharding library has reduced: this rank's slice of the mean over ranks."""

        def deliver(grad: Any) -> None:
            self._begin(support)
            scale = self._scale * self._model.comm.world
            self._accumulate(support, compact_gather(grad.to_local().reshape(-1), support.runs, scale=scale))

        return deliver

    def _hook(self, parameter: nn.Parameter, support: Support) -> None:
        deliver = (self._deliver_slice if self._model.reduces_hooked_gradients else self._sink)(support)
        self._hooked[support.name] = deliver
        # A cycle through a parameter's hooks is never collected: the model, with all of its weights, would stay for ever.
        itself, name = weakref.ref(self), support.name

        def caught(param: Tensor) -> None:
            compactor = itself()
            if compactor is not None and param.grad is not None:
                # An embedding's may be sparse.
                compactor._hooked[name](param.grad.to_dense())
                param.grad = None

        parameter.requires_grad_(True)
        handle = parameter.register_post_accumulate_grad_hook(caught)

        def undo() -> None:
            handle.remove()
            parameter.requires_grad_(False)

        self._undo.append(undo)

    def zero_grad(self) -> None:
        """Reset the gradients; what a pass that was cut short left behind goes too."""
        self._begin_anew()
        self.indices.reset()

    def _begin_anew(self) -> None:
        self._spent = False
        for support in self.supports:
            support.reached = False
        if self.supports:
            torch._foreach_zero_([support.grad for support in self.supports])
        self._reducer.discard()

    def mark_spent(self) -> None:
        """The gradients have been used: the next backward pass begins from zero."""
        self._spent = True

    def run_backward(self, loss: Tensor, scale: float) -> None:
        """Backward pass whose gradients, times ``scale`` and summed over ranks, are added to the supports' buffers."""
        self._scale, self._ended = scale, False
        self._has_graph = loss.requires_grad
        try:
            # Not where no masked entry took part here: others may wait for this rank's share of the exchange.
            if loss.requires_grad:
                loss.backward()
        finally:
            self._scale = self._mean
        if not self._ended:  # no gradient here; other ranks may have some
            self._end()

    def _begin(self, support: Support) -> None:
        """A gradient has come: have the exchange finished when this backward pass, whoever runs it, is through."""
        if self._spent:
            self._begin_anew()
        support.reached = True
        current = torch._C._current_graph_task_id()
        if current != self._backward_pass:
            self._backward_pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self._ended = True
        self._anchor.grad = None
        # No gradient came here that would have begun anew; some may come from other ranks now.
        if self._spent:
            self._begin_anew()
        flags = [support.reached for support in self.supports]
        wanted = self.indices.begin_rest()
        agreed = self._reducer.finish([*flags, self._has_graph, *wanted])
        reached, has_graph, again = agreed[: len(flags)], agreed[len(flags)], agreed[len(flags) + 1 :]
        if any(again):
            for support, dense, scale in self.indices.late(again):
                self._reducer.add(support, support.pick(dense, scale))
            self._reducer.finish([])
        self.indices.reset()
        self._has_graph = True
        for support, flag in zip(self.supports, reached, strict=True):
            support.reached = flag
        self._model.after_backward()
        if not has_graph:
            raise ValueError(
                "backward: no rank's loss depends on a masked entry; compute it with gradients enabled, from batches that use "
                "a masked parameter"
            )
        unreached = [support.name for support in self.supports if not support.reached]
        if unreached and self._is_first:
            logger.warning(
                "no gradient reached %d of %d masked parameters in the first backward pass, such as %s: they stay as they are "
                "until a batch uses them",
                len(unreached),
                len(self.supports),
                min(unreached),
            )
        self._is_first = False

    def senders_not_finite(self) -> list[int]:
        """As ``CompactReducer.senders_not_finite``."""
        return self._reducer.senders_not_finite()

    @property
    def has_unreduced(self) -> bool:
        """Whether a backward pass was cut short, by an error, before its gradients were exchanged."""
        return self._reducer.has_unreduced

    def close(self) -> None:
        """Restore the model's forward methods and freeze it again."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.indices.close()


def _away(model: Attachable, mask: Mask, linears: Mapping[str, Any]) -> set[str]:
    """Parameters whose indices no rank keeps whole: shared out, or not needed, since the library reduces the gradient itself."""
    if model.comm.world == 1:
        return set()
    leaving = [name for name in mask.units if model.indices_may_leave(name)]
    reduced = {name for name in leaving if model.reduces_hooked_gradients and name not in linears}
    blocks = [set(block) - reduced for block in blocks_of(model.module, leaving)]
    largest = max((sum(mask.units.gaps[name].words.nbytes for name in block) for block in blocks), default=0)
    return reduced.union(*blocks) if worth_sharing(largest, model.device.type) else reduced


def _join_zero_grad(module: nn.Module, reset: Callable[[], None]) -> Callable[[], None]:
    """Let ``module.zero_grad()`` reset compact gradients too (transformers' Trainer calls no other); returns the undo."""

    def zero_grad(self: nn.Module, *options: Any, **named: Any) -> None:
        type(self).zero_grad(self, *options, **named)
        if self is module:  # and not a deep copy of it
            reset()

    module.zero_grad = MethodType(zero_grad, module)  # type: ignore[method-assign]

    def undo() -> None:
        del module.zero_grad

    return undo


def _stay_whole(module: nn.Module) -> Callable[[], None]:
    """Let ``nn.DataParallel``, put around the model later, refuse to copy it; returns the undo."""
    module._replicate_for_data_parallel = refuse_data_parallel  # type: ignore[method-assign,assignment]

    def undo() -> None:
        del module._replicate_for_data_parallel

    return undo


def linear_modules(module: nn.Module) -> dict[str, nn.Linear | NF4Linear]:
    """Parameter name -> the linear layer whose weight it is.

    Left to hooks are tied weights, which two modules own, and what a weight is computed from before each pass, as pruning
    (``torch.nn.utils.prune``), weight and spectral norm do it: such a layer has no parameter of the name.
    """
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        plain_name(f"{name}.weight" if name else "weight"): child
        for name, child in module.named_modules()
        if isinstance(child, NF4Linear)
        or (type(child) in (nn.Linear, MaskedLinear) and owners.get(id(child._parameters.get("weight"))) == 1)
    }
