"""Masked training of a case on a sharded model, and the same on a plain model without a line of trace_dist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from engine.cases import Case, batches
from safetensors.torch import save_file
from torch import Tensor

from trace_dist import MaskedAdamW
from trace_dist.sharding import ShardedModel
from trace_dist.train.loss import answer_nll_sum_
from trace_dist.utils import dist


@dataclass
class Outcome:
    """Losses of every step, global gradient norms, and all weights afterwards."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


def make_optimizer(case: Case, model: ShardedModel) -> MaskedAdamW:
    return MaskedAdamW(
        model,
        case.mask(model),
        lr=case.lr,
        eps=case.eps,
        weight_decay=case.weight_decay,
        max_grad_norm=case.max_grad_norm,
    )


def train_step(
    case: Case, model: ShardedModel, optimizer: MaskedAdamW, batch: tuple[Tensor, Tensor]
) -> float:
    """One step on this rank's rows of a global batch; the mean loss over the tokens of the global batch."""
    ids, labels = (part.tensor_split(dist.world_size())[dist.rank()].to(model.device) for part in batch)
    num_tokens = int((batch[1][:, 1:] != -100).sum())
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for x, y in zip(ids.tensor_split(case.accumulation), labels.tensor_split(case.accumulation), strict=True):
        loss = answer_nll_sum_(model(input_ids=x).logits, y) / num_tokens
        model.backward(loss, reduction="sum")
        total += loss.detach().double()
    optimizer.step()
    optimizer.zero_grad()
    return float(dist.sum_over_ranks(total))


def train(case: Case, model: ShardedModel) -> Outcome:
    """Masked training; the state is on rank 0 only."""
    outcome, optimizer = Outcome(), make_optimizer(case, model)
    for batch in batches(case):
        outcome.losses.append(train_step(case, model, optimizer, batch))
        outcome.norms.append(optimizer.grad_norm)
    outcome.state = model.full_state_dict()
    model.detach()
    return outcome


def train_reference(case: Case) -> Outcome:
    """Dense AdamW on the whole global batch; after each step everything outside the mask is put back.

    The master copy is fp32 (the weight itself in an fp32 or fp64 model), the gradient norm that of the masked entries.
    """
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    model, outcome = case.model(), Outcome()
    mask = case.mask(model)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    masters = {name: torch.nn.Parameter(weight.detach().to(wide)) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(
        masters.values(), lr=case.lr, eps=case.eps, weight_decay=case.weight_decay, foreach=False
    )
    chosen = {
        name: mask.dense(name) if name in mask else torch.zeros(w.shape, dtype=torch.bool)
        for name, w in weights.items()
    }
    for ids, labels in batches(case):
        logits = model(input_ids=ids).logits.to(wide)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        for name, weight in weights.items():
            grad, weight.grad = weight.grad, None
            masters[name].grad = None if grad is None else torch.where(chosen[name], grad.to(wide), 0.0)
        grads = [master.grad for master in masters.values() if master.grad is not None]
        norm = float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())
        if case.max_grad_norm is not None:
            scale = min(1.0, case.max_grad_norm / (norm + 1e-6))
            for grad in grads:
                grad *= scale
        optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(torch.where(chosen[name], masters[name].to(weight.dtype), start[name]))
                masters[name].copy_(torch.where(chosen[name], masters[name], start[name].to(wide)))
        outcome.losses.append(loss.item())
        outcome.norms.append(norm)
    outcome.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return outcome


def save_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict on the rank that has one; tied tensors once per name."""
    if state:
        save_file({name: value.clone() for name, value in state.items()}, str(path))


def refused(action: Callable[[], object]) -> str:
    """The message of the ValueError that ``action`` raises; empty when it does not."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""
