"""``trace-dist simulate``: what is refused, in one line, before any model is built."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.program import error_line, run_here
from transformers import GptOssConfig, LlamaConfig, LlamaForCausalLM

from trace_dist.benchmarks import plan_peers as peers_module
from trace_dist.benchmarks import plan_times as times
from trace_dist.benchmarks import simulate as simulation
from trace_dist.benchmarks.plan_peers import largest_fitting, plan_peers
from trace_dist.benchmarks.plan_times import method_of, plan_times
from trace_dist.profiling.bounds import SIMULATION_ERROR
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, Option
from trace_dist.profiling.simulation.setup import SimulationSetup

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 64,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--model", "./absent"], "model='./absent': no such file or folder; give a config.json"),
        (["--model", "MODEL", "--gpu", "h200"], "gpu='h200': unknown; use one of 4090, a100, h100"),
        (["--model", "MODEL", "--gpu", "own.yaml"], "gpu='own.yaml': no such file"),
        (["--model", "MODEL", "--methods", "[dora]"], "methods: 'dora' is unknown; use some of element"),
        (["--model", "MODEL", "--nodes", "0"], "nodes=0: must be at least 1"),
        (
            ["--model", "MODEL", "--sequence_parallel", "3"],
            "sequence_parallel=3: must divide the 8 ranks of the job",
        ),
        (
            ["--model", "MODEL", "--sequence_parallel", "8"],
            "sequence_parallel=8: must divide the model's 2 attention",
        ),
        (["--model", "MODEL", "--blocks", "9"], "blocks=9: the model has 3 decoder blocks"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], fragment: str, tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model") if word == "MODEL" else word for word in arguments]
    assert fragment in error_line(run_here("simulate", *words, cache=tmp_path / "cache"))


def test_a_family_whose_code_does_not_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one without fused attention is asked for its own."""
    GptOssConfig(**SMALL, num_local_experts=2, head_dim=8).save_pretrained(tmp_path / "model")
    built = []

    def fails(make: Any, *_: Any) -> None:
        built.append(inspect.getclosurevars(make).nonlocals["race"].attention)
        raise RuntimeError("this family\nneeds pictures")

    monkeypatch.setattr(simulation, "record", fails)
    message = r"methods=\[row\]: a step of the family 'gpt_oss' cannot be simulated \(RuntimeError: this family needs pictures\)"
    with pytest.raises(ValueError, match=message):
        simulation.simulate(SimulationSetup(str(tmp_path / "model"), methods=("row",)))
    assert built == ["eager"]


def test_times_are_predicted_for_some_masks_alone() -> None:
    assert method_of(MemorySetup("m", granularity="row")) == "row"
    assert method_of(MemorySetup("m", granularity="block", block=64)) == "block 64"
    with pytest.raises(ValueError, match="granularity='block', block=32: no time is predicted"):
        method_of(MemorySetup("m", granularity="block"))
    for setup, message in (
        (MemorySetup("m", backend="fsdp2"), "backend='fsdp2': times are predicted for backend zero3"),
        (MemorySetup("m", quantize="nf4"), "quantize='nf4': .* unquantised bfloat16 weights"),
        (MemorySetup("m", dtype="float32"), "dtype='float32': times are predicted"),
        (MemorySetup("m", maskable="all"), "maskable='all': times are predicted"),
        (MemorySetup("m", world_size=12), "gpus=12: must fill nodes of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_times([Option(setup, 1, 0, 2, 1, 0, 0, 0, 0)], "h100", 400, 80)


def test_options_that_offload_have_times_too(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "model")
    kept = MemorySetup(str(tmp_path / "model"), backend="zero3", granularity="element", sequence_length=16)
    offloaded = replace(kept, offload="cpu")
    options = [Option(setup, 1, 0, 2, 1, 0, 0, 0, 0) for setup in (kept, offloaded)]
    rows = plan_times(options, "h100", 400, 80)
    steps = {row["name"]: row["step_s"]["expected"] for row in rows}
    assert list(steps) == ["element", "element, offload", "full", "LoRA"]
    assert steps["element"] < steps["element, offload"]
    # Without a GPU the same is counted of the peers, and nothing predicted.
    times_alone = ("step_s", "tokens_per_s")
    peers = [{key: row[key] for key in row if key not in times_alone} for row in rows[2:]]
    assert plan_peers(options, 80) == peers
    full, lora = peers
    module = LlamaForCausalLM(LlamaConfig.from_pretrained(kept.model))
    assert full["num_trained"] == sum(parameter.numel() for parameter in module.parameters())
    assert full["checkpoint_bytes"] == 12 * full["num_trained"] > lora["checkpoint_bytes"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "fsdp2"}, "backend='fsdp2': they are simulated for backend zero3, .*; use zero3"),
        ({"quantize": "nf4"}, "quantize='nf4': they are simulated"),
        ({"dtype": "float32"}, "dtype='float32': they are simulated"),
        ({"maskable": "all"}, "maskable='all': they are simulated"),
        ({"world_size": 5000}, "gpus=5000: they are simulated on at most 4096 ranks"),
    ],
)
def test_peers_are_simulated_of_some_values_alone(
    values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "count", lambda *_: pytest.fail("simulated"))
    with pytest.raises(ValueError, match=message):
        plan_peers([Option(MemorySetup("m", **values), 1, 0, 2, 1, 0, 0, 0, 0)], 80)


def test_peers_get_what_fits_with_and_without_recomputation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one memory for all rows: that of the plan less its reserve, whatever the named GPU has."""
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "model")

    def simulated(setup: SimulationSetup) -> dict[str, Any]:
        (name,) = setup.methods
        each = 0.5 if setup.activation_checkpointing else 2
        peak = ({"full": 10, "LoRA": 20}.get(name, 1) + each * setup.micro_batch_size) * GIB
        prices = {} if setup.price is None else {"tokens_per_dollar": {"expected": 1e6}}
        method = {
            "peak_bytes": peak,
            "num_trained": 10,
            "step_s": {"expected": 1.0},
            "tokens_per_s": {"expected": 1.0},
            **prices,
        }
        return {"methods": {name: method}}

    monkeypatch.setattr(times, "simulate", simulated)
    options = [
        Option(
            MemorySetup(str(tmp_path / "model"), granularity="row", micro_batch_size=2),
            *(19.5, 18.5, 20.5, 0, 0, 0, 0, 0),
        )
    ]
    rows = plan_times(options, "h100", 400, gpu_gib=20, reserve_gib=1, price=2.5)
    shown = ("name", "micro_batch_size", "activation_checkpointing", "fits")
    assert [tuple(row[name] for name in shown) for row in rows] == [
        ("row", 2, False, True),
        ("full", 4, False, True),
        ("full", 16, True, True),
        ("LoRA", 1, True, False),
    ]
    assert [row["peak_bytes"] / GIB for row in rows] == [19.5, 19, 19, 21.5]
    assert [row["low_bytes"] / GIB for row in rows] == [18.5, 18, 18, 20.5]
    high = [20.5, *(peak + SIMULATION_ERROR * (peak - 1) for peak in (19, 19, 21.5))]
    assert [row["high_bytes"] / GIB for row in rows] == pytest.approx(high)
    assert [row["fits_at_high"] for row in rows] == [False, False, False, False]
    assert [row.get("checkpoint_bytes") for row in rows] == [None, 120, 120, 120]
    assert all("tokens_per_dollar" in row for row in rows)
    kept = plan_times(options, "h100", 400, gpu_gib=200)
    assert [tuple(row[name] for name in shown[:3]) for row in kept[1:]] == [
        ("full", 32, False),
        ("LoRA", 32, False),
    ]


def test_few_peaks_are_asked_for() -> None:
    asked = []

    def peak(size: int) -> float:
        asked.append(size)
        return max(10.0 + size, 3.0 * size)

    assert largest_fitting(peak, 40) == 8
    assert asked == [1, 2, 16, 8]
    assert largest_fitting(peak, 11) == 1
    assert largest_fitting(peak, 10) == 0
