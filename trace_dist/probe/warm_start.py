"""The warm start: a short fine-tune of the proxy on one task, whose trace shows where the task is learned.

TRACE (arXiv 2605.31025): the update after a few steps, and the Fisher information at the point reached, rank parameters by how
much the task needs them. The proxy is small, so it is trained densely, in one process, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.data.batches import Batches, Step
from trace_dist.probe.importance.evidence import Evidence, Trace
from trace_dist.probe.learning import HeldOut, Learning
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.validation import answer_loss
from trace_dist.utils import dist


def warm_start(
    module: nn.Module,
    names: list[str],
    batches: Batches,
    probe: ProbeConfig,
    train: TrainConfig,
    dtype: str = "float32",
    description: str = "warm start",
    measured: Batches | None = None,
    heldout: HeldOut | None = None,
) -> Trace:
    """Fine-tune ``names`` for a few steps, measure, and restore the model bit for bit.

    Args:
        module: the proxy.
        names: maskable parameters; all others stay frozen.
        batches: the task's batches of ``probe.batch_size``.
        probe: steps, learning rate, Fisher batches.
        train: the remaining options of the loop.
        dtype: data type of matmuls; the weights are fp32.
        description: label of progress and logs; names the task.
        measured: batches for the gradients after it; those of the warm start go on when None.
        heldout: examples on which the loss is taken before and after.
    """
    parameters = dict(module.to(dist.local_device()).named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    tuned = {name: parameters[name] for name in names}
    # In host memory, where all evidence goes: on a GPU a copy of the proxy would lie beside its training.
    before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in tuned.items()}
    # A warm start is short: one bad step says that its rate is too high.
    train = train.strict()
    learner = DenseLearner(module, tuned.values(), train, probe.lr, dtype)
    before_loss = None if heldout is None else answer_loss(learner, heldout.step)
    result = train_steps(learner, batches, train, probe.steps, description=description, rate="probe.lr")
    update = {
        name: parameter.detach().float().cpu() - before[name].float() for name, parameter in tuned.items()
    }
    learning = None
    if heldout is not None and before_loss is not None:
        learning = Learning(before_loss, answer_loss(learner, heldout.step), heldout.chance, heldout.examples)
    # The sums of gradients take the place of the moments.
    learner.optimizer.state.clear()
    gradient, fisher = mean_gradients(learner, tuned, iter(measured or batches), probe.fisher_batches)
    evidence = {
        # in the order of its fields
        name: Evidence(*(each[name].float().cpu() for each in (before, update, gradient, fisher)))
        for name in tuned
    }
    with torch.no_grad():
        for name, parameter in tuned.items():
            parameter.copy_(before[name])
    return Trace(evidence, result.losses, learning)


def mean_gradients(
    learner: DenseLearner, tuned: dict[str, nn.Parameter], steps: Iterator[Step], num_batches: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over batches of the gradient, and of its square."""
    mean, squares = ({name: torch.zeros_like(p) for name, p in tuned.items()} for _ in range(2))
    for _ in range(num_batches):
        learner.accumulate(next(steps))
        for name, parameter in tuned.items():
            if parameter.grad is not None:
                mean[name].add_(parameter.grad, alpha=1 / num_batches)
                squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / num_batches)
                parameter.grad = None
    return mean, squares
