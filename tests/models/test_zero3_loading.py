"""Sharded loading equals an ordinary load, holds and reads no more than its share, and sends nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import free_port, python, rank_environment
from transformers import PreTrainedModel

from trace_dist.models.fingerprint import same_model
from trace_dist.models.loading import load_model_zero3
from trace_dist.models.naming import pieces_of

WORKER = Path(__file__).with_name("zero3_worker.py")
ZERO3: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def launch(num_ranks: int, out: Path, dtype: str, folders: list[Path]) -> list[dict[str, Any]]:
    result = subprocess.run(
        [
            *(python(), "-m", "torch.distributed.run"),
            *("--nproc_per_node", str(num_ranks), "--master_port", str(free_port())),
            *(str(WORKER), str(out), dtype, *map(str, folders)),
        ],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("num_ranks", "dtype", "families"),
    [
        (2, "float32", ["llama", "qwen2_moe", "gpt2"]),
        (3, "bfloat16", ["llama", "gptj", "mixtral", "gemma3_text"]),
    ],
)
def test_sharded_equals_ordinary(num_ranks, dtype, families, saved, tmp_path):
    reports = launch(num_ranks, tmp_path, dtype, [saved(family) for family in families])
    for report in reports:
        # An interval starts and ends inside a row: never more than the rest of those two.
        assert report.pop("excess_rows") < 2
        for family, found in report.items():
            assert found["wrong"] == [], family
            assert found["coded_wrong"] == [], family
            # once for codes, once for scales
            assert found.get("coded_read", 0) < 2.4 * found["share"], family
            assert found["collectives"] == [], family
            assert found["held"] == found["share"], family
            assert found["share"] <= found["read"] < 1.2 * found["share"], family
            assert found["sharded_fingerprint"] == reports[0][family]["sharded_fingerprint"], family
            assert found["generation_config"], family
            assert not found["training"], family
            assert found["persistent"] > 0, family
            assert found["logits_off_by"] < 1e-6, family
        for family in set(report) - {"mixtral", "qwen2_moe"}:  # their files store every expert apart
            assert same_model(report[family]["sharded_fingerprint"], report[family]["fingerprint"]), family


@pytest.mark.launcher
def test_checkpoints_that_do_not_fit_are_refused(make_model, tmp_path):
    model = make_model("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    up = "model.layers.1.mlp.up_proj.weight"
    variants = {
        "untied": {**state, "lm_head.weight": state["lm_head.weight"] + 1},
        "lacking": {name: value for name, value in state.items() if name != up},
        "other-size": {**state, up: state[up][:-1].clone()},
    }
    for name, changed in variants.items():
        model.save_pretrained(tmp_path / name, state_dict=changed)
    (report, _) = launch(2, tmp_path, "float32", [tmp_path / name for name in variants])
    errors = {name: found["error"] for name, found in report.items() if name in variants}
    assert (
        "model.embed_tokens.weight and lm_head.weight are tied but stored with different" in errors["untied"]
    )
    assert f"lacks 1 parameters of its model, such as {up}" in errors["lacking"]
    assert f"{up} has 1764 elements but config.json asks for 1800" in errors["other-size"]


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2}, r"zero_optimization\.stage=2.*set it to 3"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size=2.*remove it"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights=True.*remove it"),
        ({"stage": 3, "zero_quantized_nontrainable_weights": True}, "nontrainable_weights=True.*remove it"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param.device='nvme'"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, r"use MaskedAdamW\(offload='cpu'\)"),
    ],
)
def test_options_that_keep_other_copies_are_refused(zero, message, saved):
    with pytest.raises(ValueError, match=message):
        load_model_zero3(saved("llama"), "float32", {**ZERO3, "zero_optimization": zero})


def test_a_corrupt_config_is_an_error(saved):
    folder = saved("llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        load_model_zero3(folder, "float32", ZERO3)


def test_names_without_the_prefix_are_matched(make_model: Callable[..., PreTrainedModel]):
    model = make_model("gpt2")
    plain = [name.removeprefix("transformer.") for name, _ in model.named_parameters()]
    assert pieces_of(model, [*plain, "h.0.attn.masked_bias"]) == {
        name: [name.removeprefix("transformer.")] for name, _ in model.named_parameters()
    }


def test_experts_lie_end_to_end(make_model, saved):
    """transformers' own fused tensor, flattened, is the pieces one after the other."""
    model = make_model("mixtral")
    # Written back to the layout of the published checkpoints: every expert apart.
    from safetensors.torch import load_file

    stored = {k: v for file in saved("mixtral").glob("*.safetensors") for k, v in load_file(file).items()}
    pieces = pieces_of(model, stored)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert len(pieces[fused]) == 6
    assert pieces[fused][0] == "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    for name, param in model.named_parameters():
        laid = torch.cat([stored[source].reshape(-1) for source in pieces[name]])
        assert torch.equal(laid, param.reshape(-1)), name


def test_an_incomplete_set_of_experts_is_an_error(make_model, saved):
    model = make_model("mixtral")
    names = [
        f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
        for expert, part in ((0, "w1"), (0, "w3"), (1, "w1"))
    ]
    with pytest.raises(ValueError, match="cannot be read in parts; load it once with transformers"):
        pieces_of(model, names)
