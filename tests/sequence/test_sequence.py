"""Training on ranks that share rows equals training in one process, whatever the attention, the mask and the rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from sequence.cases import CASES, Outcome, resumed, train

from trace_dist import shard

pytestmark = pytest.mark.launcher
SCRIPT = Path(__file__).with_name("rank_script.py")
LOSS_TOLERANCE = 2e-6  # relative, fp32: sums over slices are rounded in another order
WEIGHT_TOLERANCE = 3e-5  # absolute; a step moves a weight by up to 1e-2, whatever the size of its gradient
ON_FOUR = ("heads", "one-key-head", "packed")
"""Cases of two groups of two ranks, which read different rows."""


@functools.cache
def alone(name: str) -> Outcome:
    """The training in one process."""
    return train(CASES[name], shard(CASES[name].model(), "single"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two ranks that share all rows."""
    folder = tmp_path_factory.mktemp("two")
    launch(SCRIPT, 2, folder, 2, *CASES, launcher="torchrun")
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some cases on four ranks: two groups of two."""
    folder = tmp_path_factory.mktemp("four")
    launch(SCRIPT, 4, folder, 2, *ON_FOUR, launcher="torchrun")
    return folder


def report(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"rank{rank}.json").read_text())


def assert_close(folder: Path, name: str) -> None:
    """bf16 rounds activations and gradients otherwise, so there the curve is only near."""
    expected, found = alone(name), report(folder)["cases"][name]
    if CASES[name].dtype == "bfloat16":
        assert found["losses"] == pytest.approx(expected.losses, rel=0.01)
        return
    assert found["losses"] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected.norms, rel=1e-5)
    state = load_file(folder / f"{name}.safetensors")
    for parameter, value in expected.state.items():
        torch.testing.assert_close(state[parameter], value, rtol=0, atol=WEIGHT_TOLERANCE, msg=parameter)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_that_share_rows_train_as_one(two: Path, name: str) -> None:
    assert_close(two, name)


@pytest.mark.parametrize("name", ON_FOUR)
def test_two_groups_of_two_train_as_one(four: Path, name: str) -> None:
    assert_close(four, name)


def test_a_loop_of_ones_own(two: Path) -> None:
    """The first loss is that of the base; the second one follows from the first step."""
    losses = report(two)["own loop"]
    assert losses[0] == pytest.approx(alone("heads").losses[0], rel=LOSS_TOLERANCE)
    assert losses[1] != pytest.approx(alone("heads").losses[0], rel=1e-3)


def test_one_process_goes_on_from_their_checkpoint(two: Path) -> None:
    found = resumed(shard(CASES["heads"].model(), "single"), two / "checkpoints")
    assert found.losses == pytest.approx(alone("heads").losses, rel=LOSS_TOLERANCE)
    for parameter, value in alone("heads").state.items():
        torch.testing.assert_close(found.state[parameter], value, rtol=0, atol=WEIGHT_TOLERANCE)


def test_half_of_the_activations_are_kept(two: Path) -> None:
    """But for the exchange, whose halves of heads are as large as the halves of the row."""
    kept = report(two)["saved"]
    assert kept["slice"] == pytest.approx(kept["whole"] / 2, rel=0.1)


def test_passes_on_whole_rows_are_those_of_the_plain_model(two: Path) -> None:
    for rank in range(2):
        assert report(two, rank)["whole rows"] == {"same": True, "generated": True}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("heads", "sequence_parallel=2: must divide the model's 3 attention heads"),
        (
            "key heads",
            "sequence_parallel=2: must divide the model's 12 attention heads, and divide its 3 key",
        ),
        (
            "attention",
            "sequence_parallel=2: runs on sdpa attention, and LlamaForCausalLM was loaded with 'eager'",
        ),
        (
            "stateful",
            "train.sequence_parallel=2: Lfm2ForCausalLM gives other answers where ranks share a row",
        ),
        ("tensor parallel", "model: 'model.layers.0.mlp.up_proj.weight' is cut by tensor parallelism"),
        (
            "tensor parallel, sharded",
            "model: 'model.layers.0.mlp.up_proj.weight' is cut by tensor parallelism",
        ),
        ("tensor parallel and fsdp2", "model: "),
        ("ranks", "sequence_parallel=4: must divide the 2 ranks of the job"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(two: Path, what: str, message: str) -> None:
    for rank in range(2):
        assert report(two, rank)["refused"][what].startswith(message)
