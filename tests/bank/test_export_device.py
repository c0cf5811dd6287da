"""What is exported where the base lies on a GPU that is not there (engine/fake_gpu.py): the same files as from a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bank.test_export_formats import bank_of, base_of, delta_of
from engine.fake_gpu import OnGpu, fake_gpu, place

from trace_dist.bank.export import export, hf, peft_shira, vllm_patch
from trace_dist.bank.export.export import load_sharded
from trace_dist.sharding.prepared import as_sharded


@pytest.mark.parametrize("kind", ["hf", "peft-shira", "vllm-patch"])
@pytest.mark.parametrize("tasks", [["one"], ["one", "two"]], ids=["one", "together"])
def test_files_are_those_of_a_base_on_the_cpu(
    kind: str, tasks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path / "base")
    bank = bank_of(tmp_path / "bank", base, *(delta_of(base, task, seed) for seed, task in enumerate(tasks)))
    there = []

    def on_device(*args: Any) -> Any:
        model = as_sharded(place(load_sharded(*args).module, "cuda"))
        there.append(all(isinstance(parameter, OnGpu) for parameter in model.module.parameters()))
        return model

    export(bank, tasks, tmp_path / "cpu", base, kind=kind)
    with fake_gpu(monkeypatch):
        for module in (hf, peft_shira, vllm_patch):
            monkeypatch.setattr(module, "load_sharded", on_device)
        export(bank, tasks, tmp_path / "gpu", base, kind=kind)
    # A patch of one delta reads no model.
    assert there == [True] or (kind, tasks) == ("vllm-patch", ["one"])
    files = [{path.name: path.read_bytes() for path in (tmp_path / at).iterdir()} for at in ("cpu", "gpu")]
    assert files[0] == files[1]
