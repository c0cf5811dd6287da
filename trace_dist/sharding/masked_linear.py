"""A linear layer whose weight gradient never leaves the backward of that layer.

Forward is the plain product ``y = x W^T + b``. Backward returns ``dy W`` for the input and hands the weight gradient to
``deliver``: dense (``dy^T x``) where the mask has scattered entries. Where it is made of whole rows or columns, only those are
computed (``dy[:, rows]^T x``, ``dy^T x[:, columns]``): the dense weight gradient and its FLOPs never exist, and of the input
only the masked columns are kept for backward. Very few entries are computed one by one (``sum over tokens of dy[:, row]
x[:, column]``). The weight itself stays frozen, hence ZeRO-3 and FSDP2 reduce nothing; they gather it again for the backward as
for any frozen layer.

[Note: aligned] A mask has exactly the rows that were chosen, say 205 of 4096. On a GPU a half-precision product with such a
side leaves the fast kernels, which want lines of 16 bytes; so up to seven more are computed and cut off. Neither the mask nor a
gradient knows of them.

[Note: used by weight] Some models use the ``.weight`` of a linear layer: ``dt_proj`` of Mamba and Jamba, fused kernels. So while
a pass runs, ``.weight`` of a masked layer is a tensor with the same storage whose dense gradient goes to ``deliver`` too. At any
other time it is the parameter.

[Note: weights in sight] Where every rank has the parameters themselves (``sharding.single``) it is the parameter at all times,
and requires a gradient: what a loss does with weights beside the layer, as a penalty on them, a loss of one's own on
``lm_head.weight`` or a gradient of a gradient, is autograd's to find, and a hook picks the masked entries out of it. The layer
steps aside where somebody has frozen the weight, has a hook on its gradient, or calls the model on other weights
(``torch.func.functional_call``).
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from trace_dist.models.nf4 import NF4Linear
from trace_dist.models.wrapping import refuse_data_parallel
from trace_dist.utils.devices import sent

ALIGNED_LINES = 8
"""Rows or columns, on an accelerator: 16 bytes in half precision."""
Deliver = Callable[[Tensor], None]
Catch = Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """Which part of a weight gradient is computed: indices [k] int64 of output and input neurons, None for all.

    With ``single`` they are pairs: the gradient of k entries. ``spare``: how many of the indices, at their end, are not asked
    for; what is computed for them is cut off ([Note: aligned]).
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    spare: int = 0
    single: bool = False

    def aligned(self, multiple: int) -> Part:
        """The same with spare indices, copies of the last one, up to a multiple of so many."""
        if self.single:
            return self
        spare = 0

        def filled(indices: Tensor | None) -> Tensor | None:
            nonlocal spare
            if indices is None:
                return None
            spare = -len(indices) % multiple
            return torch.cat([indices, indices[-1:].expand(spare)])

        rows, columns = filled(self.rows), filled(self.columns)
        return Part(rows, columns, spare)

    def to(self, device: torch.device) -> Part:
        """The same on another device."""
        rows, columns = (
            None if indices is None else sent(indices, device) for indices in (self.rows, self.columns)
        )
        return Part(rows, columns, self.spare, self.single)

    def cut(self, product: Tensor) -> Tensor:
        """A gradient without what is spare."""
        if not self.spare:
            return product
        return product[: -self.spare] if self.columns is None else product[:, : -self.spare]


GATHERED = 2**22
"""Activations that are gathered at a time for single entries."""


def single_entries(grad: Tensor, x: Tensor, part: Part) -> Tensor:
    """The weight gradient at single entries.

    Args:
        grad: of the output, [tokens, outputs].
        x: the input, [tokens, inputs].
        part: k pairs of rows and columns.

    Returns:
        [k], summed in fp32 (fp64 for an fp64 model).
    """
    rows, columns = part.rows, part.columns
    if rows is None or columns is None:
        raise AssertionError("single entries have a row and a column each")
    wide = torch.promote_types(grad.dtype, torch.float32)
    found = grad.new_empty(len(rows), dtype=wide)
    size = max(1, GATHERED // max(1, len(grad)))
    for start in range(0, len(rows), size):
        some = slice(start, start + size)
        found[some] = (grad[:, rows[some]].to(wide) * x[:, columns[some]].to(wide)).sum(0)
    return found


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        anchor: Tensor,
        module: nn.Linear | NF4Linear,
        part: Part,
        deliver: Deliver,
    ) -> Tensor:
        ctx.save_for_backward(x if part.columns is None or part.single else x[..., part.columns])
        ctx.module, ctx.part, ctx.deliver = module, part, deliver
        # Autocast would keep the cast of a leaf, which has no graph here, for who needs one.
        out = F.linear(x, module.weight.detach(), bias)
        # A view that a function returns must not be changed in place, as some models change what a layer gives.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        (x,) = ctx.saved_tensors
        dtype = grad_out.dtype  # under autocast that of the product, not of x and the weight
        flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
        flat_x = x.reshape(-1, x.shape[-1]).to(dtype)
        part: Part = ctx.part
        with torch.no_grad():
            if part.single:
                ctx.deliver(single_entries(flat_grad, flat_x, part))
            else:
                picked = flat_grad if part.rows is None else flat_grad[:, part.rows]
                ctx.deliver(part.cut(picked.T @ flat_x))
        weight, grad_x, grad_weight = ctx.module.weight, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_out @ weight.to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[2] and _is_asked(*(node for node, _ in ctx.next_functions[-2:])):
            if flat_x.shape[-1] != weight.shape[-1]:
                raise ValueError(
                    "torch.autograd.grad: the gradient of a weight whose mask is of columns is known there alone; leave the "
                    "weight out, or take a mask of rows, blocks or elements"
                )
            grad_weight = (flat_grad.T @ flat_x).to(weight.dtype)
        grad_bias = flat_grad.sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, grad_weight, None, None, None, None


class _CaughtWeight(torch.autograd.Function):
    """A weight as it is; its gradient is delivered."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, deliver: Deliver) -> Tensor:
        ctx.deliver = deliver
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.deliver(grads[0])
        return None, None, None


class MaskedLinear(nn.Linear):
    """What an ``nn.Linear`` is while a mask covers it ([Note: used by weight])."""

    catch: Catch

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The parameter, or, while a pass runs, what stands for it; what torch computes for a layer that has no such parameter
        any more, as after ``weight_norm`` or pruning."""
        # By its key: DeepSpeed gathers a weight that is read so, and one that is got by ``get`` not.
        if "weight" in self._parameters and (parameter := self._parameters["weight"]) is not None:
            return self.catch(parameter) if "catch" in self.__dict__ else parameter
        if "weight" in self.__dict__:
            return self.__dict__["weight"]
        raise AttributeError("weight")

    @weight.setter
    def weight(self, value: Any) -> None:
        self.__dict__["weight"] = value

    def _replicate_for_data_parallel(self) -> NoReturn:
        refuse_data_parallel()

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        """A copy of it, in memory or in a file, is an ordinary layer, which has no mask."""
        state = {name: value for name, value in self.__dict__.items() if name not in ("forward", "catch")}
        return copyreg._reconstructor, (nn.Linear, object, None), state  # type: ignore[attr-defined]


class RunningPass:
    """Whether a model runs forward or backward at this moment; hooks on the model and on its children know of the first.

    Args:
        module: the model. Whoever runs its body alone, as for a loss of one's own on the hidden states, runs a child.
    """

    def __init__(self, module: nn.Module) -> None:
        self._depth = 0
        self._handles = []
        for part in (module, *module.children()):
            self._handles.append(part.register_forward_pre_hook(self._enter))
            self._handles.append(part.register_forward_hook(self._leave, always_call=True))

    def __bool__(self) -> bool:
        return self._depth > 0 or torch._C._current_graph_task_id() != -1

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def patch_linear(
    module: nn.Linear | NF4Linear,
    anchor: Tensor,
    part: Part,
    deliver: Deliver,
    running: RunningPass | bool = True,
    in_sight: nn.Parameter | None = None,
) -> Callable[[], None]:
    """Run ``module`` through the masked linear function.

    Args:
        module: the layer; its weight is frozen.
        anchor: scalar that requires grad, so that backward runs even for an input that does not.
        part: the part of the weight gradient to compute.
        deliver: receives that part, [rows or out, columns or in] or [entries], in the dtype of the activations or fp32; or, where
            the model uses the weight itself, the whole, in the dtype of the weight.
        running: whether a use of ``.weight`` at this moment is the model's.
        in_sight: its weight, where a hook catches what autograd finds for it ([Note: weights in sight]).

    Returns:
        A function that restores the layer.
    """

    # Methods, not closures over the layer: a deep copy of the model runs on its own weights, and delivers nothing.
    def forward(self: nn.Linear | NF4Linear, input: Tensor) -> Tensor:
        if self is not module or not torch.is_grad_enabled() or steps_aside(self):
            return F.linear(input, self.weight, self.bias)
        weight = None if in_sight is None else in_sight.view_as(in_sight)
        return _MaskedLinear.apply(input, self.bias, weight, anchor, self, part, deliver)

    def steps_aside(self: nn.Linear | NF4Linear) -> bool:
        return in_sight is not None and (
            self._parameters.get("weight") is not in_sight
            or not in_sight.requires_grad
            or _has_hooks(in_sight)
        )

    def catch(self: nn.Linear | NF4Linear, weight: Tensor) -> Tensor:
        caught = self is module and in_sight is None and torch.is_grad_enabled() and running
        return _CaughtWeight.apply(weight, anchor, deliver) if caught else weight

    layer: Any = module
    # Not None where another library, or another mask, has replaced it.
    before, caught = layer.__dict__.get("forward"), layer.__dict__.get("catch")
    layer.forward, layer.catch = MethodType(forward, layer), MethodType(catch, layer)
    if isinstance(layer, nn.Linear):
        layer.__class__ = MaskedLinear

    def undo() -> None:
        del layer.forward, layer.catch
        if before is not None:
            layer.forward = before
        if caught is not None:
            layer.catch = caught
        elif type(layer) is MaskedLinear:  # and no class that torch's parametrizations have derived from it
            layer.__class__ = nn.Linear  # type: ignore[assignment]

    return undo


def _has_hooks(weight: nn.Parameter) -> bool:
    """Whether somebody else than the mask, which has one, has a hook on a weight's gradient."""
    accumulated = weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    return bool(weight._backward_hooks) or (accumulated is not None and len(accumulated) > 1)


def _is_asked(weight: Node, anchor: Node) -> bool:
    """Whether ``torch.autograd.grad``, or ``backward(inputs=...)``, asks the pass that is running for a weight's gradient.

    Any other pass runs to the anchor, which nobody asks for.
    """
    of_weight, of_anchor = map(torch._C._will_engine_execute_node, (weight, anchor))
    return of_weight and not of_anchor
