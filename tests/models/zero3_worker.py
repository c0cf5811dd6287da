"""Run by test_zero3_loading under torchrun: load models sharded and compare with ordinary loads.

    torchrun --nproc_per_node 2 zero3_worker.py <out folder> <dtype> <checkpoint folder> ...

Each rank writes ``<out>/<rank>.json``: per checkpoint what differed, was held, was read, or why not.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters

from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model, load_model_zero3
from trace_dist.models.nf4 import quantize_nf4
from trace_dist.models.weight_files import WeightFiles
from trace_dist.sharding.zero3 import start_deepspeed
from trace_dist.utils import dist

COLLECTIVES = ("broadcast", "all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor")


class Spy:
    """Counts the elements that slices hand out, and how many of them were asked for."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.excess_rows = 0.0
        self.collectives: list[str] = []

    def install(self) -> None:
        original_view, original_read = WeightFiles._view, WeightFiles.read
        spy = self

        class View:
            def __init__(self, name: str, view: Any) -> None:
                self.name, self.view = name, view

            def __getitem__(self, key: Any) -> torch.Tensor:
                values = self.view[key]
                spy.read[self.name] = spy.read.get(self.name, 0) + values.numel()
                return values

            def __getattr__(self, attribute: str) -> Any:
                return getattr(self.view, attribute)

        def read(files: WeightFiles, name: str, start: int, stop: int) -> torch.Tensor:
            before = spy.read.get(name, 0)
            values = original_read(files, name, start, stop)
            row = math.prod(files.shape(name)[1:])
            spy.excess_rows = max(spy.excess_rows, (spy.read.get(name, 0) - before - (stop - start)) / row)
            return values

        WeightFiles._view = lambda files, name: View(name, original_view(files, name))
        WeightFiles.read = read
        for name in COLLECTIVES:
            self._watch(name)

    def _watch(self, name: str) -> None:
        original = getattr(deepspeed.comm, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.collectives.append(name)
            return original(*args, **kwargs)

        setattr(deepspeed.comm, name, watched)


def zero3(dtype: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
    }


def differences(model: torch.nn.Module, expected: torch.nn.Module) -> list[str]:
    """Names of parameters and buffers that are not bit-equal, and of ties that differ."""
    wrong = []
    for (name, param), (same, value) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        with GatheredParameters([param]):
            # bytes: 4-bit words may look like NaN
            equal = torch.equal(param.data.view(torch.uint8), value.data.view(torch.uint8))
            if not (name == same and param.dtype == value.dtype and equal):
                wrong.append(name)
        shard = param.ds_tensor
        pad = max(0, min(shard.numel(), (torch.distributed.get_rank() + 1) * shard.numel() - param.ds_numel))
        if pad and bool(shard[-pad:].any()):
            wrong.append(f"padding of {name}")
    for (name, buffer), (same, value) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        if not (name == same and buffer.dtype == value.dtype and torch.equal(buffer, value)):
            wrong.append(name)
    return wrong


def coded_differences(folder: str, dtype: str, spy: Spy, report: dict[str, Any]) -> list[str]:
    """What differs between a 4-bit model made in shards and one made of the whole model."""
    spy.read.clear()
    spy.collectives.clear()
    model = load_model_zero3(folder, dtype, zero3(dtype), "nf4")
    report["coded_read"], report["collectives"] = sum(spy.read.values()), list(spy.collectives)
    return differences(model, quantize_nf4(load_model(folder, dtype)))


def examine(folder: str, dtype: str, spy: Spy) -> dict[str, Any]:
    spy.read.clear()
    spy.collectives.clear()
    try:
        model = load_model_zero3(folder, dtype, zero3(dtype))
    except ValueError as error:
        return {"error": str(error)}
    report: dict[str, Any] = {"collectives": list(spy.collectives), "read": sum(spy.read.values())}
    params = list(model.parameters())
    report["held"] = sum(param.ds_tensor.numel() for param in params)
    report["share"] = sum(-(-param.ds_numel // torch.distributed.get_world_size()) for param in params)
    report["stored"] = sum(param.ds_numel for param in params)
    report["sharded_fingerprint"] = fingerprint(model)
    report["fingerprint"] = fingerprint(folder)
    expected = load_model(folder, dtype)
    report["wrong"] = differences(model, expected)
    report["training"] = model.training
    report["coded_wrong"] = [] if folder.endswith("gpt2") else coded_differences(folder, dtype, spy, report)
    report["generation_config"] = model.generation_config.to_dict() == expected.generation_config.to_dict()

    engine, *_ = deepspeed.initialize(model=model, config=zero3(dtype))  # gathers the persistent parameters
    tokens = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        logits, wanted = engine(input_ids=tokens).logits, expected(input_ids=tokens).logits
    report["logits_off_by"] = float((logits - wanted).abs().max())
    report["persistent"] = sum(param.ds_persist for param in engine.module.parameters())
    return report


def main() -> None:
    out, dtype, *folders = sys.argv[1:]
    start_deepspeed()
    spy = Spy()
    spy.install()
    reports = {Path(folder).name: examine(folder, dtype, spy) for folder in folders}
    reports["excess_rows"] = spy.excess_rows  # type: ignore[assignment]
    Path(out, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(reports))
    dist.close()


if __name__ == "__main__":
    main()
