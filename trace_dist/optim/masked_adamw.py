"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) on the masked entries of a model.

Gradients, both moments and the fp32 master copy are compact: they exist for masked entries only, on the rank that owns them.
The update runs inside this rank's partition; every other weight stays bit-identical, weight decay included.

    optimizer = MaskedAdamW(model, mask, lr=1e-3)    # model: from shard(), plain, DDP, or fully_shard'ed
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from trace_kernels.compact import compact_gather, compact_scatter, compact_sumsq

from trace_dist.config import StateDtype
from trace_dist.config.train import LEAST_EPS
from trace_dist.masks.mask import Mask, check_mask
from trace_dist.models.places import refuse_overlapping
from trace_dist.optim.batches import Batches, Entry, can_batch, sum_of_squares
from trace_dist.optim.entries import Entries
from trace_dist.optim.factors import own_factors
from trace_dist.optim.groups import Groups
from trace_dist.optim.loaded import Loaded
from trace_dist.optim.offload import HostEntries, Offload
from trace_dist.optim.part_server import PartServer, Source
from trace_dist.optim.parts import locate, owned
from trace_dist.optim.pieces import restore
from trace_dist.optim.states import MOMENTS, State, StateOptions, new_state, scaled_update, tensors_of, update
from trace_dist.optim.torch_checkpoint import refuse_torch_checkpoint
from trace_dist.sharding.prepared import as_sharded
from trace_dist.sharding.single import ReplicatedModel
from trace_dist.utils import dist
from trace_dist.utils.agreement import agree
from trace_dist.utils.devices import sent
from trace_dist.utils.finite import check_finite

if TYPE_CHECKING:
    from trace_kernels.runs import Runs

    from trace_dist.sharding.base import ShardedModel
    from trace_dist.sharding.support import Support


KINDS = ("master", *MOMENTS)


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW over a mask; a plain ``torch.optim.Optimizer`` to LR schedulers and training loops.

    Each entry of the parameter group stands for the masked entries of one parameter on this rank: [n] without storage, its
    ``.grad`` the compact gradient that backward passes accumulate, which may be assigned (``entries``). The first pass after a
    step begins from zero even where nobody called ``zero_grad`` (Trainer calls that of the DDP model around it, which reaches no
    compact gradient). A ``GradScaler`` for fp16 skips a step, and lowers its scale, on all ranks together (``scaled_gradient``).

    Weights that are loaded later, by ``load_state_dict`` or by a Trainer that resumes, are trained on from there. What is written
    through ``.data`` is not noticed where there is a master copy or offload. The loop may go on calling a DeepSpeed engine, but
    for its ``step()``.

    Args:
        model: a sharded model, or a model that is plain, in DDP, sharded by ``fully_shard`` (by hand or by accelerate) or by a
            DeepSpeed ZeRO-3 engine without an optimizer. It is frozen and the mask attached to it, replacing any other.
        mask: which entries to train.
        lr: learning rate, 0 or more.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator, 1e-37 or more.
        weight_decay: decoupled, on masked entries only.
        max_grad_norm: global norm over the masked entries of all ranks above which gradients are scaled down; None for no limit.
            Tools that clip ``model.parameters()``, as Trainer does, find no gradient there and clip nothing.
        state_dtype: of both moments: float32, bfloat16, or 8bit (blockwise codes).
        master: keep an fp32 copy of masked half-precision weights; without it bf16 weights are rounded stochastically.
        offload: ``cpu`` keeps moments and master in host memory and updates there.
        scale: parameter -> [entries of the mask there] factors in [0, 1] on the learning rate, equal on every rank; 1 where a
            parameter is left out. They are no part of the state: give them again when training goes on.
        check_first: know the gradient norm before any weight changes, also where gradients are not clipped: they are read twice.

    Raises:
        ValueError: the mask does not fit the model, something else owns the model's gradients, an option is out of range, or
            the ranks were given different ones.
    """

    def __init__(
        self,
        model: ShardedModel | nn.Module,
        mask: Mask,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "float32",
        master: bool = True,
        offload: Literal["none", "cpu"] = "none",
        scale: Mapping[str, Tensor] | None = None,
        check_first: bool = False,
    ) -> None:
        _check_hyperparameters(lr, betas, eps, weight_decay, max_grad_norm)
        options = StateOptions(state_dtype, master, offload)
        check_mask(mask)
        self.model = as_sharded(model)
        masked = {name: self.model.like(name).dtype for name in self.model.names() if name in mask.units}
        for name, dtype in masked.items():
            options.check_weight(name, dtype)
        if self.model.weights_in_sight:
            copied = (
                name for name, dtype in masked.items() if offload == "cpu" or (master and dtype.itemsize < 4)
            )
            refuse_overlapping(self.model.module, set(copied))
        self.mask = mask
        self.max_grad_norm, self.check_first = max_grad_norm, check_first
        self.grad_norm = 0.0
        """Global gradient norm over masked entries before clipping, at the last step."""
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        agree({**defaults, "max_grad_norm": max_grad_norm, **vars(options)})
        self.supports = self.model.attach(mask)
        self._dtypes = {support.name: self.model.dtype_of(support.name) for support in self.supports}
        self._offload = Offload(self.supports, self.model.storage) if offload == "cpu" else None
        self._factors = own_factors(scale or {}, self.supports, self._updates_on)
        entries = [Entries.of(support, self.model) for support in self.supports]
        super().__init__(entries, defaults)
        self.param_groups = Groups(self.param_groups)
        for support, parameter in zip(self.supports, entries, strict=True):
            self.state[parameter] = new_state(self._weights(support), options)
        self._loaded = Loaded(self.model, [(s, self._copies(s, state)) for s, state in self.compact()])
        self._batches = Batches()
        self._server = self._serve() if dist.world_size() > 1 else None

    def compact(self) -> list[tuple[Support, State]]:
        """(support, state) per masked parameter, in the model's order."""
        parameters = self.param_groups[0]["params"]
        return [(s, self.state[parameter]) for s, parameter in zip(self.supports, parameters, strict=True)]

    def model_states(self) -> dict[str, list[Tensor]]:
        """What training keeps between steps on this rank, by category (weights, master, moments, gradients, indices, ...), for
        counting bytes."""
        states = [tensors_of(state) for _, state in self.compact()]
        kept = {
            name: [s[key] for s in states for key in s if key in (name, f"{name}_absmax")] for name in KINDS
        }
        kept |= {"factors": list(self._factors.values())} if self._factors else {}
        staged = [] if self._offload is None else list(self._offload.entries.values())
        return {
            "weights": self.model.held(),
            **kept,
            "gradients": [support.grad for support in self.supports],
            "indices": [tensor for support in self.supports for tensor in support.indices()]
            + [overlay.gaps.words for overlay in self.model.overlays()]
            + self.model.index_shares(),
            "staging": [tensor for entries in staged for tensor in (entries.values, entries.grad)],
        }

    def _serve(self) -> PartServer:
        """Let other ranks ask for this rank's part. Collective."""
        values = partial(_host_values, self.model, self._offload)
        source = Source(owned(self.supports), self.compact(), values)
        return PartServer(self, source, self._updates_on, linger=isinstance(self.model, ReplicatedModel))

    def _weights(self, support: Support) -> Tensor:
        """What the weight holds at a support's entries, in its dtype, where the states live: [n]."""
        if self._offload is not None:
            return self._offload.entries[support.name].values
        local, runs = self.model.stored(support)
        return compact_gather(local, runs).to(local.dtype)

    def _copies(self, support: Support, state: State) -> list[Tensor]:
        """What holds a support's entries beside the weight: [n] each."""
        staged = [] if self._offload is None else [self._offload.entries[support.name].values]
        return [*staged, state["master"]] if "master" in state else staged

    def values(self, support: Support) -> Tensor:
        """Present values of a support's entries in full precision: the master copy, or the weights where there is none. [n]."""
        self._loaded.follow([support])
        parameter = self.param_groups[0]["params"][self.supports.index(support)]
        state = self.state[parameter]
        return state["master"] if "master" in state else self._weights(support)

    def set_values(self, values: list[Tensor]) -> None:
        """Overwrite the masked entries: master copy and weights. Collective.

        Args:
            values: [n] of any floating dtype per support, in the order of ``supports``.
        """
        for (support, state), new in zip(self.compact(), values, strict=True):
            if "master" in state:
                state["master"].copy_(new)
            if self._offload is None:
                local, runs = self.model.storage(support)
                compact_scatter(local, runs, sent(new, local.device))
            else:
                self._offload.entries[support.name].values.copy_(new)
                self._offload.write_back(support)
        self._loaded.agree()
        self.model.refresh(self.supports)

    def _check_ready(self) -> None:
        if not self.model.is_attached(self.supports):
            raise ValueError(
                "MaskedAdamW: another mask was attached to the model since; build a new optimizer for each mask"
            )
        replaced = self.model.replaced()
        if replaced:
            raise ValueError(
                f"MaskedAdamW: {replaced[0]!r} was replaced in the model since, as resize_token_embeddings, fully_shard and "
                "load_state_dict(assign=True) do; build the optimizer after them"
            )
        for name, dtype in self._dtypes.items():
            if (now := self.model.dtype_of(name)) != dtype:
                raise ValueError(
                    f"MaskedAdamW: {name!r} was cast from {dtype} to {now} since; cast the model first, and build the optimizer "
                    "after that"
                )
        if self.model.has_unreduced_gradients():
            raise ValueError(
                "MaskedAdamW: a backward pass was cut short and its gradients were not summed over the ranks; call zero_grad() "
                "and run the pass again"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update from the accumulated gradients. Collective.

        A parameter that no rank's loss depended on stays as it is: no weight decay, no momentum, and it grows no older.

        Args:
            closure: computes the loss anew, with gradients; called once, before the update.

        Returns:
            What the closure returned; None without one.

        Raises:
            ValueError: another optimizer has taken over the model, parameters were replaced or cast, or a backward pass was cut
                short.
            NotFinite: the gradient norm is infinite or NaN, on all ranks together; where it is checked first, nothing has
                changed, and after ``zero_grad()`` training can go on.
        """
        self._check_ready()
        self._loaded.follow(self.supports)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        reached = self._reached()
        if self.check_first or self.max_grad_norm is not None:
            norm, limit = self._record_norm(self._sum_of_squares(reached)), self.max_grad_norm
            self._update(reached, 1.0 if limit is None else min(1.0, limit / (norm + 1e-6)))
        else:
            squares = torch.zeros((), dtype=torch.float64, device=self._updates_on)
            self._update(reached, 1.0, squares)
            self._record_norm(squares)
        self.model.refresh(reached)
        self.model.mark_gradients_spent()
        if self._server is not None:
            self._server.clock.tick()
        return result

    def _reached(self) -> list[Support]:
        """The supports with a gradient, from backward or by the caller's hand; the same on every rank. Collective."""
        silent = [support for support in self.supports if not support.reached]
        if silent:
            written = torch.stack([support.grad.any() for support in silent]).to(torch.int32)
            for support, flag in zip(silent, self.model.comm.max(written).tolist(), strict=True):
                support.reached = bool(flag)
        return [support for support in self.supports if support.reached]

    @property
    def _updates_on(self) -> torch.device:
        """Where the states live and the update runs."""
        return torch.device("cpu") if self._offload is not None else self.model.device

    def _update(self, supports: list[Support], grad_scale: float, squares: Tensor | None = None) -> None:
        """Update some supports; the squares of their gradients are added to ``squares`` in the same pass over them."""
        group = self.param_groups[0]
        states = {support.name: state for support, state in self.compact()}

        def step(support: Support, weight: Tensor, runs: Runs, grad: Tensor) -> None:
            name, factors = support.name, self._factors.get(support.name)
            operands = (name, weight, runs, grad, states[name], group, grad_scale, squares)
            if factors is None:
                update(*operands)
            else:
                scaled_update(*operands, factors)

        def on_host(support: Support, host: HostEntries) -> None:
            step(support, host.values, host.runs, host.grad)

        if self._offload is not None:
            self._offload.step(supports, on_host)
            return
        batched: list[Entry] = []
        for support in supports:
            weight, runs = self.model.storage(support)
            if support.name not in self._factors and can_batch(weight, states[support.name]):
                batched.append((support.name, weight, runs, support.grad, states[support.name]))
            else:
                step(support, weight, runs, support.grad)
        if squares is not None:
            squares += sum_of_squares([grad for *_, grad, _ in batched], squares.device)
        self._batches.step(batched, group, grad_scale)

    def _sum_of_squares(self, supports: list[Support]) -> Tensor:
        """Of this rank's gradients: 0-dim fp64."""
        if self.model.device.type != "cpu":
            return sum_of_squares([support.grad for support in supports], self.model.device)
        squares = torch.zeros((), dtype=torch.float64)
        for support in supports:
            squares += compact_sumsq(support.grad)
        return squares

    def _record_norm(self, squares: Tensor) -> float:
        """The global norm from this rank's sum of squares."""
        self.grad_norm = float(self.model.comm.sum(squares.to(self.model.device)).sqrt())
        check_finite(self.grad_norm, "the gradient norm")
        return self.grad_norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the mask says what is trained, at one rate."""
        if self.param_groups:
            raise ValueError(
                "add_param_group: MaskedAdamW trains the entries of its mask alone; give other parameters to an optimizer of "
                "their own, and other rates of masked entries as scale="
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> NoReturn:
        # What torch keeps of an optimizer has neither the mask nor the model.
        raise ValueError(
            "MaskedAdamW: it belongs to its model, and is neither copied nor pickled; keep its state_dict(), and load that into "
            "an optimizer that is built anew"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the compact gradients; the buffers stay."""
        if self.model.is_attached(self.supports):
            self.model.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state and values, and a stand-in for those of the other ranks.

        It is local, as Trainer calls it on rank 0 alone. When it is pickled (``torch.save``) or deep-copied, the stand-in
        becomes the other ranks' states, on the CPU, for which ``part_server`` asks them then; nobody is held up. So the rank
        that saves needs memory for all states: where that is too much, ``trace_dist.checkpoint`` lets each rank write its own.

        Raises:
            ValueError: ``torch.distributed.checkpoint`` asks for it.
        """
        refuse_torch_checkpoint()
        packed = super().state_dict()
        packed["values"] = [self.values(support) for support in self.supports]
        packed["mask_digest"] = self.mask.digest()
        packed["owned"] = owned(self.supports)
        if self._server is not None:
            packed["others"] = self._server.others
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``state_dict``, one that was kept in memory or a saved one of any number of ranks, and write its values into
        the model. Collective.

        Raises:
            ValueError: the state belongs to another mask, lacks a part, or was kept with other options.
        """
        if not self.mask.has_digest(state_dict.get("mask_digest")):
            raise ValueError(
                "optimizer state: it was saved for another mask; build MaskedAdamW with the mask it was saved with"
            )
        others = state_dict.get("others", {})
        parts = [state_dict, *(others.values() if isinstance(others, dict) else ())]
        entries = self.compact()
        found = locate(entries, parts)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        # torch has put a plain list there
        self.param_groups = Groups(self.param_groups)
        steps = {support.name: state_dict["state"][i]["step"] for i, support in enumerate(self.supports)}
        for (_, state), parameter in zip(entries, self.param_groups[0]["params"], strict=True):
            self.state[parameter] = state
        self.set_values(restore(entries, found, steps))


def _host_values(model: ShardedModel, offload: Offload | None, support: Support) -> Tensor:
    """What a weight holds at a support's entries, on the CPU; copies alone, as ``part_server`` asks: [n] in its dtype."""
    if offload is not None:
        return offload.entries[support.name].values
    local, runs = model.stored(support)
    local = local.cpu()
    return compact_gather(local, runs.to(local.device)).to(local.dtype)


def _check_hyperparameters(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if math.isinf(value):
            raise ValueError(f"{name}={value!r}: must be finite; give a number")
    if not lr >= 0:
        raise ValueError(f"lr={lr!r}: must not be negative; use for example 1e-3")
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ValueError(f"betas={betas!r}: both must lie in [0, 1); use for example (0.9, 0.999)")
    if not eps > 0:
        raise ValueError(f"eps={eps!r}: must be positive; use for example 1e-8")
    if eps < LEAST_EPS:
        raise ValueError(f"eps={eps!r}: is too small for fp32; use at least {LEAST_EPS}, for example 1e-8")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}: must not be negative; use 0 for none")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm!r}: must be positive; use None for no clipping")
