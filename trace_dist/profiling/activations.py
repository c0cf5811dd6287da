"""What one forward and backward pass allocates, found without memory: the real module runs on the meta device.

Every storage that an operator makes is counted from its birth to its death (as ``torch.distributed._tools.MemTracker`` does under
fake tensors), so activations kept for backward, gradients of activations, logits and temporaries are those of the real code,
whatever the architecture. Weight gradients of masked linear layers are left out: they depend on the mask (``estimate``).

Three things differ from a run on a device. Attention and the grouped products of experts are replaced (``stand_ins``). Questions
about values (transformers asks whether an attention mask is all ones, experts which tokens are theirs) are answered by
``utils.meta_values``. Every position bears loss.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from trace_dist.models.blocks import whole_blocks
from trace_dist.models.forward import names_argument
from trace_dist.models.nf4 import NF4Linear, named_weights
from trace_dist.profiling.stand_ins import grouped_product, replace_attention
from trace_dist.sharding.masked_linear import Part, patch_linear
from trace_dist.train.cross_entropy import chunks_on_meta, nll_sum_
from trace_dist.train.loss import answer_nll_sum_
from trace_dist.utils.meta_values import MetaValues

Phase = Literal["forward", "backward"]
Kind = Literal["activations", "logits"]


@dataclass
class Moment:
    """From one hook of a sharding library to the next.

    Attributes:
        where: such as ``forward of lm_head``.
        fetches: parameters that must be gathered from here on; empty for a module without any, None where no module begins.
        releases: parameters that are no longer used by this module.
        whole: whether they are those of a whole module, with its children: a decoder block, or, at the beginning of backward,
            the model (which itself fetches nothing).
        peak: the most bytes alive, by kind.
        delivers: masked linear weight whose gradient is formed here, or None.
        at_delivery: bytes alive when it is.
    """

    where: str
    fetches: tuple[str, ...] | None = None
    releases: tuple[str, ...] = ()
    whole: bool = False
    peak: Mapping[Kind, int] | None = None
    delivers: str | None = None
    at_delivery: Mapping[Kind, int] | None = None


CHUNKS = 2
"""Of logits that a loss upcasts in turn: the second begins while the first is there, and the others are like it."""


@dataclass(frozen=True, eq=False)
class StepTrace:
    """One forward and backward pass.

    Attributes:
        moments: in order of time.
        saved: bytes alive between forward and backward.
    """

    moments: list[Moment]
    saved: int


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages made while it is entered."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.alive: dict[Kind, int] = {"activations": 0, "logits": 0}
        self.kind: Kind = "activations"
        self.moments = [Moment("forward")]
        self.values = MetaValues()
        self._references: dict[int, Any] = {}
        for tensor in known:
            self._references[tensor.untyped_storage()._cdata] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            result = grouped_product(*args, **(kwargs or {}))
        else:
            result = self.values.run(func, args, kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        moment = self.moments[-1]
        if moment.peak is None or sum(self.alive.values()) > sum(moment.peak.values()):
            moment.peak = dict(self.alive)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, kind, size = storage._cdata, self.kind, storage.nbytes()
        if key in self._references:
            return

        def died(_: object) -> None:
            self.alive[kind] -= size
            del self._references[key]

        self._references[key] = weakref.ref(storage, died)
        self.alive[kind] += size

    def mark(self, moment: Moment) -> None:
        """Begin the next moment."""
        moment.peak = dict(self.alive)
        self.moments.append(moment)


def trace_step(
    module: nn.Module,
    masked: Mapping[str, int | None],
    micro_batch_size: int,
    sequence_length: int,
    activation_checkpointing: bool = False,
    device: str = "cpu",
) -> StepTrace:
    """Run one micro-batch forward and backward on the meta device.

    Args:
        module: a causal LM on the meta device; used up (it is frozen and set to training mode).
        masked: parameter that a mask covers -> how many columns, where it is made of whole columns.
        micro_batch_size: examples.
        sequence_length: tokens per example.
        activation_checkpointing: recompute decoder layers in backward, as ``train.activation_checkpointing`` does.
        device: type of the device whose step it is; the loss upcasts more logits at a time on a GPU.
    """
    module.train()
    _checkpoint(module, activation_checkpointing)
    known = [*module.parameters(), *module.buffers()]
    live = _LiveStorages(iter(known))
    with warnings.catch_warnings(), _prepared(module, masked, live), live, chunks_on_meta(device, CHUNKS):
        warnings.simplefilter("ignore")
        loss = _loss(module, micro_batch_size, sequence_length, live)
        saved = sum(live.alive.values())
        live.mark(Moment("backward of the model", fetches=(), whole=True))
        loss.backward()
    return StepTrace(live.moments, saved)


def _checkpoint(module: Any, enabled: bool) -> None:
    if not enabled:
        module.gradient_checkpointing_disable()
        return
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _loss(module: Any, batch: int, length: int, live: _LiveStorages) -> Tensor:
    """``train.loss.forward_nll_sum`` where every token has a label; what it asks of labels has no answer on the meta device."""
    ids = torch.empty(batch, length, dtype=torch.int64, device="meta")
    options = {"use_cache": False} if names_argument(module, "use_cache") else {}
    if not names_argument(module, "logits_to_keep"):
        return answer_nll_sum_(module(input_ids=ids, **options).logits, ids, 1 / ids.numel())
    logits = module(input_ids=ids, logits_to_keep=ids[0, 1:], **options).logits
    return nll_sum_(logits.flatten(0, 1), ids[:, 1:].flatten(), 1 / ids.numel())


@contextmanager
def _prepared(module: nn.Module, masked: Mapping[str, int | None], live: _LiveStorages) -> Iterator[None]:
    """Masked linear layers without their weight gradient, hooks on what a sharding library gathers, and both undone."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    anchor = torch.zeros((), requires_grad=True, device="meta")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    blocks = whole_blocks(module)
    within = tuple(f"{path}." for path in blocks)
    owners: dict[int, list[nn.Module]] = {}
    undo: list[Callable[[], None]] = []
    undo.append(replace_attention())
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for path, child in module.named_modules():
        for parameter in child.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(child)
        if path.startswith(within):
            use = None if next(child.parameters(recurse=False), None) is None else _Use()
        else:
            used = child.parameters(recurse=path in blocks)
            use = _Use(tuple(names[id(parameter)] for parameter in used), path in blocks)
        if use is not None:
            undo += _watch(child, path, use, live, child is head)
    for name, weight in named_weights(module):
        if name not in masked:
            continue
        if isinstance(weight, NF4Linear):
            undo.append(patch_linear(weight, anchor, _part(masked[name]), _delivery(name, live)))
            continue
        users = owners[id(weight)]
        if len(users) == 1 and type(users[0]) is nn.Linear and users[0].weight is weight:
            undo.append(patch_linear(users[0], anchor, _part(masked[name]), _delivery(name, live)))
        else:
            weight.requires_grad_(True)
            undo.append(weight.register_post_accumulate_grad_hook(_drop_grad).remove)
    try:
        yield
    finally:
        for step in undo:
            step()


def _part(columns: int | None) -> Part:
    """No rows, so that no weight gradient is counted; the columns, since of the input only they are saved."""
    indices = torch.empty(columns or 0, dtype=torch.int64, device="meta")
    return Part(rows=indices[:0], columns=None if columns is None else indices)


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def _delivery(name: str, live: _LiveStorages) -> Callable[[Tensor], None]:
    def deliver(_: Tensor) -> None:
        live.moments[-1].delivers = name
        live.moments[-1].at_delivery = dict(live.alive)

    return deliver


class _Use(NamedTuple):
    """What a module's hooks fetch and release: None inside a block, which is gathered as one; see ``Moment.whole``."""

    names: tuple[str, ...] | None = None
    whole: bool = False


class _Boundary(torch.autograd.Function):
    """Passes tensors on, and calls back in the backward pass when their gradients are there.

    What it returns are no views, as those of torch's module hooks are: some models (Falcon, Llama-4) change a module's output in
    place.
    """

    @staticmethod
    def forward(ctx: Any, reached: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.reached = reached
        ctx.set_materialize_grads(False)
        return tuple(tensor.data for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.reached()
        return None, *grads


def _bounded(values: tuple[Any, ...], reached: Callable[[], None]) -> tuple[Any, ...]:
    """``values`` with a boundary behind those that need a gradient."""
    differentiable = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not differentiable:
        return values
    passed = iter(_Boundary.apply(reached, *differentiable))
    return tuple(
        next(passed) if isinstance(value, Tensor) and value.requires_grad else value for value in values
    )


def _watch(
    child: nn.Module, path: str, use: _Use, live: _LiveStorages, is_head: bool
) -> list[Callable[[], None]]:
    """Mark when a module's parameters are needed and when they are not, as DeepSpeed's and FSDP2's hooks do."""

    def begin(phase: Phase) -> None:
        if is_head:
            live.kind = "logits"
        live.mark(Moment(f"{phase} of {path}", fetches=use.names, whole=use.whole))

    def end(phase: Phase) -> None:
        if is_head and phase == "backward":
            live.kind = "activations"
        live.mark(Moment(f"after {phase} of {path}", releases=use.names or (), whole=use.whole))

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        begin("forward")
        return args if use.names == () else _bounded(args, partial(end, "backward"))

    def after(_: nn.Module, __: Any, result: Any) -> Any:
        end("forward")
        if isinstance(result, Tensor):
            return _bounded((result,), partial(begin, "backward"))[0]
        return _bounded(result, partial(begin, "backward")) if type(result) is tuple else result

    handles = [child.register_forward_pre_hook(before)]
    if use.names != ():
        handles.append(child.register_forward_hook(after))
    return [handle.remove for handle in handles]
