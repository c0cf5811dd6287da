"""Whose random numbers a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trace_dist.checkpoint.format import rank_file
from trace_dist.checkpoint.random_state import random_state, restore_random_state


def test_the_generator_is_that_of_the_ranks_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has not made its GPU the current one draws from that GPU all the same."""
    states = {torch.device("cuda", number): torch.tensor([number], dtype=torch.uint8) for number in range(4)}
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states[device].copy_(state))
    save_file(random_state(), tmp_path / rank_file())
    for state in states.values():
        state.fill_(9)
    with safe_open(tmp_path / rank_file(), "pt") as file:
        restore_random_state({rank_file(): file})
    assert [int(state) for state in states.values()] == [9, 9, 2, 9]
