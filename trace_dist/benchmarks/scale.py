"""The study behind docs/scale.md: what one H100 measured, and what is predicted for many GPUs.

    python -m trace_dist.benchmarks.scale docs/results/scale.json

Nothing but a CPU is needed, for half an hour. Each part is written when it is done; a study that was cut goes on, where
code and hardware are those of before.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from trace_dist.benchmarks.contestants import SHAPES, Race
from trace_dist.benchmarks.simulate import Key, simulate
from trace_dist.config import Granularity
from trace_dist.masks.mask import Mask
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.simulation.events import Program
from trace_dist.profiling.simulation.gpus import gpu_names
from trace_dist.profiling.simulation.rank import simulated_rank
from trace_dist.profiling.simulation.setup import METHODS, PEERS, SimulationSetup
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils.env import made_alike, meta_info, run_info
from trace_dist.utils.files import read_json, write_json
from trace_dist.utils.log import get_logger, setup_logging

logger = get_logger(__name__)
MEASURED = ("gpu_step_1b", "gpu_step_8b")
"""Results beside the study's own: steps of one H100."""
BATCH, LENGTH = 4, 2048
"""8,192 tokens per GPU and step."""
RANKS: dict[int, tuple[str, ...]] = {64: ("row", "full"), 1024: ("row", "full", "element", "LoRA")}
"""Ranks, eight on each node, beside those of one node -> what is simulated there."""
ON_A_NODE = (*METHODS, *PEERS, "row, FSDP2", "row, offload")
"""What is simulated on eight GPUs."""
GPU_GIB, GIB = 23.5, 2**30
PLAN: dict[str, Any] = {
    "quantize": "nf4",
    "density": 0.05,
    "offload": "cpu",
    "activation_checkpointing": True,
}
"""Of ``trace-dist memory plan``, for GPUs of 24 GB. bf16 weights do not fit there."""
SHOWN = ("state_dtype", "master", "micro_batch_size", *PLAN)
PLANNED: tuple[Granularity, ...] = ("row", "block")
"""Masks of a 70B model that are planned."""
LLAMA_70B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
Found = dict[str, Any]


class Study:
    """The parts of the study; ``folder`` holds models' configs."""

    def __init__(self, results: Path, folder: Path) -> None:
        self._results, self._folder = results, folder
        self._node: dict[Key, Program] = {}
        self.parts: dict[str, Callable[[], Any]] = {
            **{f"node, {name}": partial(self._on_a_node, name) for name in ("row", "full")},
            **{name: partial(self._measured, name) for name in MEASURED},
            "attach, row": partial(self._attach, "row"),
            **{f"node, {name}": partial(self._on_a_node, name) for name in ON_A_NODE},
            **{
                f"{ranks} ranks, {name}": partial(self._on_ranks, ranks, name)
                for ranks, names in RANKS.items()
                for name in names
            },
            **{f"70B, {kind}": partial(self._plan, kind) for kind in PLANNED},
            "attach, block": partial(self._attach, "block"),
        }

    def _config(self, shape: str) -> str:
        path = self._folder / shape
        LlamaConfig(**(LLAMA_70B if shape == "Llama-3-70B" else SHAPES[shape])).save_pretrained(path)
        return str(path)

    def _measured(self, name: str) -> Found:
        """What was measured on one H100, simulated: method -> peak and step, and where the measurement lies."""
        result = read_json(self._results / f"{name}.json")
        settings = result["settings"]
        names = [row["name"] for row in result["rows"] if "error" not in row]
        setup = SimulationSetup(
            *(self._config(settings["shape"]), 1, 1),
            methods=tuple(names),
            density=settings["density"],
            micro_batch_size=settings["micro_batch"],
            sequence_length=settings["sequence"],
        )
        methods = simulate(setup)["methods"]
        return {each: {key: methods[each][key] for key in ("peak_bytes", "step_s")} for each in names}

    def _on_a_node(self, name: str) -> dict[str, Found]:
        """One method on eight GPUs of each kind; all that is counted, and the predictions for each."""
        found = {}
        for gpu in gpu_names():
            setup = self._setup(8, name, gpu)
            found[gpu] = simulate(setup, self._node)["methods"][name]
        return found

    def _on_ranks(self, ranks: int, name: str) -> Found:
        return simulate(self._setup(ranks, name, "h100"))["methods"][name]

    def _setup(self, ranks: int, name: str, gpu: str) -> SimulationSetup:
        model = self._config("Llama-3-8B")
        return SimulationSetup(
            *(model, ranks // 8, 8, gpu), methods=(name,), micro_batch_size=BATCH, sequence_length=LENGTH
        )

    def _plan(self, kind: Granularity) -> Found:
        """The estimated memory of a 70B model on eight GPUs of 24 GB, by ``PLAN``, with the largest micro-batch that fits."""
        for size in (8, 4, 2, 1):
            way = replace(self._planned, granularity=kind, micro_batch_size=size)
            needed = self._estimator(way)
            gib = needed.peak / GIB + 1  # for CUDA's context and buffers
            if gib <= GPU_GIB or size == 1:
                break
        return {
            "plan": {name: getattr(way, name) for name in SHOWN},
            "gib": gib,
            "headroom_gib": GPU_GIB - gib,
            "host_gib": sum(needed.host.values()) / GIB,
        }

    @cached_property
    def _planned(self) -> MemorySetup:
        return MemorySetup(
            self._config("Llama-3-70B"),
            block=64,
            world_size=8,
            sequence_length=LENGTH,
            checkpoint_async=False,
            **PLAN,
        )

    @cached_property
    def _estimator(self) -> Estimator:
        return Estimator(self._planned.model, self._planned.dtype, self._planned.quantize)

    def _attach(self, kind: str) -> Found:
        """CPU seconds in which one of 1,024 ranks attaches a mask of a 70B model and takes its values and states back."""
        race = _Big("tiny", attention="sdpa")
        with simulated_rank(1024):
            model = Zero3Model(race.model())
            begin = time.process_time()
            mask = Mask.random(model, 0.05, kind, seed=0, block=64)
            drawn = time.process_time()
            optimizer = MaskedAdamW(model, mask, lr=1e-4)
            attached = time.process_time()
            optimizer.load_state_dict(optimizer.state_dict())
            resumed = time.process_time()
        return {
            "entries": mask.num_entries,
            "draw_s": drawn - begin,
            "attach_s": attached - drawn,
            "resume_s": resumed - attached,
        }


class _Big(Race):
    def config(self) -> Any:
        return LlamaConfig(**LLAMA_70B)


def main(out: Path) -> None:
    """Do all parts that ``out`` lacks; all of them where other code or hardware made those that it has."""
    setup_logging()
    found: Found = read_json(out) if out.is_file() else {"parts": {}}
    if found["parts"] and not made_alike(found):
        logger.warning("%s: other code or hardware; all parts are done anew", out)
        found = {"parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(out.parent, Path(folder))
        for name, part in study.parts.items():
            if name in found["parts"]:
                continue
            begin = time.perf_counter()
            found["parts"][name] = part()
            logger.info("%s: %.0f s", name, time.perf_counter() - begin)
            write_json(out, {"run_info": run_info(), "meta_info": meta_info(), "parts": found["parts"]})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
