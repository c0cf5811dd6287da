"""Masked training on GPUs, one rank on each, equals dense AdamW on the CPU. Without a GPU nothing of it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.comparing import assert_close, assert_frozen_bits
from engine.toy import train_toy_in_one_process
from engine.training import Outcome, train, train_reference
from launching import TESTS, launch
from safetensors.torch import load_file

from trace_dist import shard

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a rank on each GPU wrote, over NCCL."""
    made = tmp_path_factory.mktemp("gpus")
    words = (made, "parity", "fsdp2", "toy")
    ranks = TESTS / "engine" / "ranks.py"
    launch(ranks, torch.cuda.device_count(), *words, launcher="torchrun", timeout=1800, warm=False, gpus=True)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Section -> what rank 0 found."""
    return json.loads((folder / "rank0.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_single_process(name: str) -> None:
    outcome = train(CASES[name], shard(CASES[name].model(), "single"))
    assert_frozen_bits(name, outcome.state)
    assert_close(name, outcome)


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(("section", "prefix"), [("parity", ""), ("fsdp2", "fsdp2-")])
@pytest.mark.parametrize("name", CASES)
def test_ranks(folder: Path, found: dict[str, Any], section: str, prefix: str, name: str) -> None:
    """ZeRO-3 and FSDP2."""
    state = load_file(folder / f"{prefix}{name}.safetensors")
    assert_frozen_bits(name, state)
    assert_close(name, Outcome(found[section][name]["losses"], found[section][name]["norms"], state))


@pytest.mark.timeout(2000)
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_layers_that_run_twice_or_not_at_all(found: dict[str, Any], granularity: str) -> None:
    for name, value in train_toy_in_one_process(granularity, torch.cuda.device_count()).items():
        torch.testing.assert_close(
            torch.tensor(found["toy"][granularity][name]), value, rtol=0, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("name", ["element-everything", "row", "qwen2-columns"])
def test_fifty_steps_in_float64(name: str) -> None:
    """Where rounding hides nothing, though the CPU sums in another order."""
    case = replace(CASES[name], dtype="float64", steps=50)
    outcome, expected = train(case, shard(case.model(), "single")), train_reference(case)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-10)
    start = case.model().state_dict()
    for parameter, value in expected.state.items():
        torch.testing.assert_close(outcome.state[parameter], value, rtol=1e-8, atol=1e-10, msg=parameter)
        frozen = value == start[parameter]
        assert torch.equal(outcome.state[parameter][frozen], start[parameter][frozen]), parameter
