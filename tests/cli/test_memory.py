"""``trace-dist memory``: what is printed and written, and a measurement on two real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli.program import error_line, run, run_here
from jsonargparse import Namespace
from launching import free_port
from transformers import LlamaConfig

from trace_dist.benchmarks import plan_peers, plan_times, simulate
from trace_dist.cli import memory_commands
from trace_dist.profiling import plan as planning
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.simulation.setup import SimulationSetup


def asked(**arguments: Any) -> Any:
    """The arguments of ``memory plan``, as they are parsed."""
    usual = {"gpu": "h100", "gpus": 8, "gpu_gib": 24.0, "reserve_gib": 1.0, "link_gbps": 400.0}
    return Namespace(**usual | {"price": None, "peers": True, "out": None} | arguments)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    LlamaConfig(
        vocab_size=2000, hidden_size=256, num_hidden_layers=3, num_attention_heads=4, intermediate_size=700
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_estimate_prints_a_table_and_writes_json(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "estimate.json"
    arguments = ["--model", model / "config.json", "--world_size", 4, "--sequence_length", 64, "--out", out]
    done = run_here("memory", "estimate", *arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["setup"]["world_size"] == 4
    assert found["estimate"]["peak"] == sum(found["estimate"]["peak_parts"].values())
    assert f"{found['estimate']['peak'] / 2**20:,.1f} MiB" in done.stdout
    assert "zero3 on 4 ranks" in done.stdout


def test_plan_lists_what_fits_or_says_what_would(model: Path, tmp_path: Path) -> None:
    arguments = ["memory", "plan", "--model", model, "--sequence_length", 64, "--reserve_gib", 0]
    out = tmp_path / "plan.json"
    shown = [*arguments, "--gpu_gib", 24, "--backend", "single", "--out", out]
    done = run_here(*shown, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "one GPU of 24 GiB" in done.stdout
    lines = [line for line in done.stdout.splitlines() if "LoRA" in line]
    assert len(lines) == 1
    left_out = (
        "full fine-tuning and LoRA are left out: backend='single': they are simulated for backend zero3"
    )
    assert lines[0].startswith(left_out)
    assert list(json.loads(out.read_text())) == ["options"]
    line = error_line(run_here(*arguments, "--gpu_gib", 0.001, cache=tmp_path / "cache"))
    assert "gpu_gib=0.001: nothing fits: the leanest option (density 0.01, 8bit states" in line
    assert "use GPUs of 1 GiB" in line


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["estimate", "--model", "./absent"], "model='./absent': no such file or folder; give a config.json"),
        (["estimate", "--model", "MODEL", "--density", "2"], "density=2.0: must lie in (0, 1]"),
        (["profile", "--model", "MODEL", "--steps", "1"], "steps=1: must be at least 2"),
        (["estimate", "--model", "MODEL", "--state_dtype", "4bit"], "state_dtype"),
        (["plan", "--model", "MODEL", "--density", "0.1"], "density"),
        (["plan", "--model", "MODEL", "--gpus", "0"], "gpus=0: must be at least 1"),
        (["plan", "--model", "MODEL", "--price", "2"], "price=2: is of predicted steps"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], fragment: str, model: Path, tmp_path: Path) -> None:
    words = [str(model) if word == "MODEL" else word for word in arguments]
    assert fragment in error_line(run_here("memory", *words, cache=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "h200"}, "gpu='h200': unknown"),
        ({"link_gbps": -1.0}, "link_gbps=-1.0: must be a positive number"),
        ({"price": 0.0}, "price=0.0: must be a positive number"),
        ({"gpus": 12}, "gpus=12: must fill nodes"),
    ],
)
def test_what_times_cannot_be_predicted_of_is_said_before_the_plan(
    arguments: dict[str, Any], message: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "plan", lambda *_: pytest.fail("planned before"))
    setup = MemorySetup(str(model), granularity="row")
    with pytest.raises(ValueError, match=message):
        memory_commands._plan(setup, asked(**arguments))


def test_a_plan_is_written_before_its_times(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plan.json"

    def fails(*_: Any) -> None:
        raise ValueError(f"{len(json.loads(out.read_text())['options'])} options were there")

    monkeypatch.setattr(plan_times, "plan_times", fails)
    setup = MemorySetup(str(model), granularity="row", sequence_length=16)
    with pytest.raises(ValueError, match=r"^[1-9]\d* options were there"):
        memory_commands._plan(setup, asked(out=str(out)))


def test_peers_stand_below_the_plan_where_no_gpu_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the plan is there before them."""
    out = tmp_path / "plan.json"
    gib = 2**30

    def found(setup: SimulationSetup) -> dict[str, Any]:
        assert list(json.loads(out.read_text())) == ["options"]
        assert shown or "what fits" in capsys.readouterr().out
        shown.append(setup)
        (name,) = setup.methods
        peak = {"full": 22.5, "LoRA": 4}[name] * gib * (0.5 + 0.5 * setup.micro_batch_size)
        return {"methods": {name: {"peak_bytes": peak, "host_bytes": 0, "num_trained": 10**9}}}

    shown: list[SimulationSetup] = []
    monkeypatch.setattr(plan_peers, "count", found)
    setup = MemorySetup(str(model), granularity="head", sequence_length=16)
    memory_commands._plan(setup, asked(gpu=None, gpus=12, out=str(out)))
    rows = json.loads(out.read_text())["peers"]
    assert [(row["name"], row["micro_batch_size"], row["fits"], row["fits_at_high"]) for row in rows] == [
        ("full", 1, True, False),
        ("LoRA", 8, True, True),
    ]
    assert all(setup.world_size == 12 for setup in shown)
    full, lora = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("│ "))
    assert full[1::2] == ["full", "1,000.0", "-", "1", "23.5", "22.5", "24.8*", "yes", "-", "11.18"]
    assert lora[1] == "LoRA"


def test_a_family_that_cannot_be_simulated_is_planned_without_peers(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("needs pictures")

    monkeypatch.setattr(simulate, "record", fails)
    setup = MemorySetup(str(model), sequence_length=16)
    memory_commands._plan(setup, asked(gpu=None, gpus=1))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("full fine-tuning and LoRA are left out: model=")
    assert "(RuntimeError: needs pictures)" in last


def test_peers_are_left_out_where_they_are_not_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_peers, "count", lambda *_: pytest.fail("simulated"))
    setup = MemorySetup(str(model), granularity="row", sequence_length=16)
    memory_commands._plan(setup, asked(gpu=None, peers=False))
    assert "LoRA" not in capsys.readouterr().out

    def found(setup: SimulationSetup) -> dict[str, Any]:
        assert setup.methods == ("row",)
        seconds = dict.fromkeys(("low", "expected", "high"), 1.0)
        return {"methods": {"row": {"peak_bytes": 1, "step_s": seconds, "tokens_per_s": seconds}}}

    monkeypatch.setattr(plan_times, "simulate", found)
    memory_commands._plan(setup, asked(peers=False))
    assert "LoRA" not in capsys.readouterr().out


@pytest.mark.launcher
def test_two_ranks_hold_what_was_predicted(model: Path, tmp_path: Path) -> None:
    launcher = [
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
    ]
    out, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    arguments = [
        "--model",
        model,
        "--sequence_length",
        64,
        "--granularity",
        "row",
        "--out",
        out,
        "--plot",
        plot,
    ]
    done = run("memory", "profile", *arguments, cache=tmp_path / "cache", launcher=launcher)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["setup"]["world_size"] == 2
    assert len(found["measured"]["rank_peaks"]) == 2
    assert abs(found["errors"]["states"]) < 0.01
    for name, predicted in found["estimate"]["between"].items():
        assert found["measured"]["between"][name] == pytest.approx(predicted, rel=0.05), name
        assert f"{name} after forward" in done.stdout
    assert abs(found["errors"]["peak"]) < 0.4  # of 20 MB; the study in docs/results is within 10 %
    assert [name for name, _, _ in found["timeline"]["phases"][:3]] == ["forward", "backward", "step"]
    assert plot.read_bytes()[:4] == b"\x89PNG"
