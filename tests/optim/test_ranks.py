"""Tools that know nothing of states shared out over ranks: Trainer and accelerate under torchrun, and a plain ``torch.save``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from optim.rank_script import BF16, LATE, OPTIONS, make, step, tensors

from trace_dist.optim.parts import locate

pytestmark = pytest.mark.launcher
SCRIPT = Path(__file__).parent / "rank_script.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("optim")
    launch(SCRIPT, 2, out, launcher="torchrun", timeout=900)
    return out


@pytest.fixture(scope="module")
def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("tool", ["trainer", "accelerate"])
def test_a_run_resumed_by_a_tool_equals_the_uninterrupted_one(reports: list[Any], tool: str) -> None:
    assert all(report[tool]["equal"] and report[tool]["ddp"] for report in reports)


def test_trainer_trains_a_mask_of_linear_layers(reports: list[Any]) -> None:
    for report in reports:
        assert report["trainer"]["changed"] == report["trainer"]["masked"]


@pytest.mark.parametrize("option", OPTIONS)
def test_rank_0_saves_alone_while_the_others_go_on(folder: Path, reports: list[Any], option: str) -> None:
    """The file has every rank's part, bit for bit, and each rank takes its own out of it."""
    for report in reports:
        assert report["alone"][option] == {"restored": True, "continued": True}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_two_ranks_saved_one_process_continues(folder: Path, option: str) -> None:
    model = BF16.model()
    optimizer = make(model, BF16, **OPTIONS[option])
    optimizer.load_state_dict(torch.load(folder / f"{option}.pt", weights_only=True))
    if option != "8bit":  # which is coded in other blocks
        parts = [torch.load(folder / f"{option}-{rank}.pt", weights_only=True) for rank in range(2)]
        joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        assert all(map(torch.equal, tensors(optimizer), joined))
    step(model, optimizer, 3)
    for rank in range(2):
        expected = torch.load(folder / f"{option}-weights-{rank}.pt", weights_only=True)
        for mine, other in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=2**-7, atol=5e-3 if option == "8bit" else 1e-3)


def test_a_part_alone_is_not_enough(folder: Path) -> None:
    saved = torch.load(folder / "float32.pt", weights_only=True)
    optimizer = make(BF16.model(), BF16)
    del saved["others"]
    with pytest.raises(ValueError, match="a part of this rank's entries is missing") as caught:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="another rank or number of ranks"):
        locate(optimizer.compact(), [])


def test_the_others_stay_until_rank_0_has_saved(folder: Path) -> None:
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert list(saved["others"]) == [1]


def test_an_overflow_on_one_rank_skips_the_step_of_all(reports: list[Any]) -> None:
    for report in reports:
        assert report["scaled"] == {"changed": [False, True], "scales": [512, 512]}


def test_what_ranks_would_not_do_together_is_refused(reports: list[Any]) -> None:
    """A norm of one rank's gradients; a parameter beside the mask whose gradients DDP's idle reducer would not sum."""
    for report in reports:
        assert (
            "clip_grad_norm_: the gradients of MaskedAdamW are this rank's part"
            in report["beside"]["clipped"]
        )
        assert "'model.norm.weight' requires a gradient beside the mask" in report["beside"]["trained"]


@pytest.mark.parametrize("maskable", LATE)
def test_ddp_around_the_model_later_is_as_good_as_before(reports: list[Any], maskable: str) -> None:
    """It keeps a bucket for one parameter, reduces nothing, and leaves nothing behind."""
    for report in reports:
        assert report["late"][maskable] == {
            "bucketed": 1,
            "equal": True,
            "dense": 0,
            "unfrozen": 0,
            "ignored": 0,
        }
