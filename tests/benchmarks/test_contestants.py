"""Whoever may take part in the race of training steps trains the same model on the same batch, on two ranks.

And what two ranks send and keep is what one simulated rank of two does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.contestants_script import COMPILED, OF_SHARED
from launching import launch
from transformers import LlamaForCausalLM

from trace_dist.benchmarks import peers
from trace_dist.benchmarks.contestants import (
    CONTESTANTS,
    FLOOR,
    FOR_GPUS,
    FSDP2,
    LIGER,
    MASKED,
    NARROW,
    TUNED,
    Race,
    build,
)

pytestmark = pytest.mark.launcher
HERE = Path(__file__).parent
SHARED = [f"{name}, shared" for name in OF_SHARED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("contestants") / "found.json"
    launch(HERE / "contestants_script.py", 2, out, launcher="torchrun")
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("simulated") / "found.json"
    launch(HERE / "simulated_script.py", 1, out, launcher="python")
    return json.loads(out.read_text())


def test_all_begin_alike_and_learn(found: dict[str, Any]) -> None:
    assert list(found) == [*CONTESTANTS, *COMPILED, *SHARED]
    begin = found["full"]["losses"][0]
    for name, contestant in found.items():
        losses = contestant["losses"]
        # Of ranks that share rows each has the loss of its slices.
        assert losses[0] == pytest.approx(begin, rel=0.05 if name in SHARED else 0.01), name
        assert losses[-1] < losses[0], name
    trained = {name: contestant["num_trained"] for name, contestant in found.items()}
    assert trained[FLOOR] < min(trained[name] for name in CONTESTANTS if name != FLOOR)
    for name in (*MASKED, "LoRA", "SHiRA"):
        assert trained[name] < 0.1 * trained["full"], name
    for name in ("full", "LoRA"):
        assert trained[f"{name}{TUNED}"] == trained[name]
    for name in COMPILED:
        assert found[name]["losses"] == pytest.approx(found[f"full{FSDP2}"]["losses"], rel=0.01), name


@pytest.mark.parametrize(
    "name", ["element", "block 64", "row", "full", "LoRA", f"row{FSDP2}", f"full{FSDP2}", *SHARED]
)
def test_a_simulated_rank_sends_and_keeps_what_a_real_one_does(
    found: dict[str, Any], simulated: dict[str, Any], name: str
) -> None:
    real, rank = found[name], simulated["two ranks"][name]
    assert rank["sent"] == real["sent"]
    assert rank["num_trained"] == real["num_trained"]
    ours = {kind: size for kind, size in rank["kept_bytes"].items() if kind in real["states"]}
    # On an accelerator single elements are decoded by a kernel, which keeps two numbers for each chunk of indices.
    if name == "element":
        assert 0 < ours.pop("indices") - real["states"].pop("indices") <= 16 * simulated["masked matrices"]
    assert ours == real["states"]


@pytest.mark.parametrize("name", ["row", "full"])
def test_repeated_blocks_are_the_whole_model(simulated: dict[str, Any], name: str) -> None:
    whole, repeated = simulated["whole"][name], simulated["repeated"][name]
    # Of so small a model the last block's bytes are no peak.
    differing = set(_differing(whole, repeated)) - {"/peak_bytes"}
    # Which units are drawn is chance, and how many of them the first rank owns: of a mask alone.
    assert not differing or name == "row"
    assert repeated["launches"] == whole["launches"]
    assert repeated["collectives"] == whole["collectives"]
    assert repeated["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.01)
    assert repeated["step_s"]["expected"] == pytest.approx(whole["step_s"]["expected"], rel=0.01)


def _differing(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict):
        return [found for key in one for found in _differing(one[key], other[key], f"{path}/{key}")]
    return [] if one == pytest.approx(other, rel=1e-9) else [path]


def test_more_ranks_keep_less_of_everything_but_shared_indices(simulated: dict[str, Any]) -> None:
    few, many = (simulated[ranks]["element"]["kept_bytes"] for ranks in ("two ranks", "64 ranks"))
    for kind in ("weights", "master", "exp_avg", "gradients"):
        assert many[kind] < few[kind] / 16, kind
    assert many["indices"] > few["indices"] / 8


@pytest.mark.parametrize("name", [name for name in FOR_GPUS if name.endswith(LIGER)])
def test_ligers_kernels_want_a_gpu_and_their_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="want a GPU"):
        build(name, Race("tiny"))
    monkeypatch.setattr(peers.dist, "local_device", lambda: torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=r"pip install 'trace-dist\[gpu\]'"):
        peers.with_liger(LlamaForCausalLM(Race("tiny").config()))


def test_a_narrow_twin_is_as_deep() -> None:
    """Its memory is that of as many modules, and of hardly any numbers."""
    whole, twin = Race("SmolLM2-135M"), Race(f"SmolLM2-135M{NARROW}")
    assert twin.config().num_hidden_layers == whole.config().num_hidden_layers
    assert twin.config().hidden_size == Race("tiny").config().hidden_size
