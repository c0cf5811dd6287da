"""A DeepSpeed engine of the caller's in a loop that calls it, without an optimizer of DeepSpeed's.

The engine expects that optimizer to count, reduce and apply gradients, and refuses a backward pass without one. Here they are
caught, exchanged and applied elsewhere (``compaction``, ``optim``), so there is nothing to refuse, and only passes to count.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def let_train(engine: Any) -> None:
    """Let ``engine.backward(loss)`` and ``loss.backward()`` run on what ``engine(...)`` gives; ``engine.step()`` says who steps.

    Either pass is divided by the engine's ``gradient_accumulation_steps``, and counted, as DeepSpeed does: a loop may ask
    ``is_gradient_accumulation_boundary()`` when to step.
    """
    latest, counted = -1, True

    def begin(is_boundary: bool) -> None:
        # Called as a pass begins. After loss.backward() a DeepSpeed optimizer, which counts gradients, would stop the timers.
        nonlocal latest, counted
        task = torch._C._current_graph_task_id()
        if task in (-1, latest):
            return
        latest, counted = task, False
        engine.global_steps += int(is_boundary)
        if not engine._running_engine_backward:
            torch.autograd.Variable._execution_engine.queue_callback(engine._backward_epilogue)

    def count(*_: Any) -> None:
        # Not at the end of a pass: until the next one begins, the engine is asked whether that one was the last.
        nonlocal counted
        if engine.training and torch.is_grad_enabled():
            engine.micro_steps += int(not counted)
            counted = True

    engine.step = _refuse_step
    engine._support_torch_style_backward = True
    engine.enable_backward_allreduce = False
    engine.optimizer.set_gradient_accumulation_boundary = begin
    engine.register_forward_pre_hook(count)


def _refuse_step(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "engine.step(): this DeepSpeed engine has no optimizer of its own; call step() of the MaskedAdamW that was built on it"
    )
