"""Runs of one method that are cut in this process, short and with few examples, and what they come to all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from continual.small import OF_THE_CLOCK, make_config, result

from trace_dist.config import ContinualConfig, RunConfig
from trace_dist.continual.driver import check_methods, run_continual

RATES = {
    "lora_retrieved": 2e-2,
    "ewc": 1e-2,
    "ella": 1e-2,
    "ps": 1e-2,
    "osft": 2e-2,
    "olora": 2e-2,
    "slao": 2e-2,
    "shira_random": 2e-2,
    "joint": 1e-2,
    "separate": 1e-2,
}
"""Methods that ours are compared with -> learning rate."""
FROZEN = ("nearest_mean", "random_features")
"""Methods that train nothing, for classes."""
STEPS = 12
CHECKPOINT_EVERY = 5
NUM_TRAIN, NUM_TEST = 100, 16


def one_method(folder: Path, name: str, run: str, options: dict[str, Any]) -> RunConfig:
    """A run of one method."""
    cfg = make_config(folder, [name], run)
    few = [replace(task, num_train=NUM_TRAIN, num_test=NUM_TEST) for task in (*cfg.tasks, cfg.general[0])]
    train = replace(cfg.train, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY)
    chosen = ContinualConfig([name], {name: options} if options else {})
    return replace(cfg, tasks=few[:2], general=few[2:], train=train, continual=chosen)


def finished(cfg: RunConfig) -> dict[str, Any]:
    """The result of a run without what the clock says of it."""
    run_continual(cfg)
    found = result(cfg, cfg.continual.methods[0])
    return {key: value for key, value in found.items() if key not in OF_THE_CLOCK}


def cut(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, call: int) -> None:
    """Run until a function of a class is called for the so-manieth time."""
    with monkeypatch.context() as patched:
        patched.setattr(owner, function, _mortal(getattr(owner, function), call))
        with pytest.raises(KeyboardInterrupt):
            run_continual(cfg)


def cut_at_every_border(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut when the first task is learned and nothing of it kept, when its state is written, and when the second is learned."""
    kind = check_methods(cfg)[0].kind
    for function, call in (("score", 2), ("state", 1), ("score", 2)):
        cut(cfg, monkeypatch, kind, function, call)


def _mortal(function: Callable[..., Any], last: int) -> Callable[..., Any]:
    calls = []

    def called(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == last:
            raise KeyboardInterrupt
        return function(*arguments)

    return called
