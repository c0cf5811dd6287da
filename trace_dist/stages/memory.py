"""Stage ``memory``: model states of masked and of full training under ZeRO-3, counted while both really train.

Model states are what must be there between steps: weights, fp32 master, both moments, gradients, and the mask's indices. Both are
measured in bf16 on the run's own target and first task, after a backward pass, summed over ranks, per parameter.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch

from trace_dist.config import RunConfig, TrainConfig
from trace_dist.data.batches import Step
from trace_dist.masks.mask import Mask
from trace_dist.models.nf4 import BYTES_PER_ELEMENT, NF4Linear, named_weights
from trace_dist.profiling.selection import moment_bytes
from trace_dist.profiling.states import bytes_per_param
from trace_dist.sharding.dense import FullAdamW
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.stages.base import prepare_base
from trace_dist.stages.stage import Stage
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loss import accumulate
from trace_dist.train.workbench import Workbench
from trace_dist.utils import dist
from trace_dist.utils.files import write_json
from trace_dist.utils.log import outcome
from trace_dist.utils.together import on_main

MEASURED_LR = 1e-4
"""Of the steps that are taken to be measured; states have the same size at any rate."""


MEASURED_STEPS = 3
"""Passes of each kind of training: two whole steps, and one after which states are counted."""
EXAMPLES_PER_RANK = 8


def describe(cfg: RunConfig) -> Stage:
    """Measure both kinds of training on the first task's mask."""
    inputs = {cfg.folder.mask(cfg.tasks[0].name): "project"}
    return Stage("memory", ["memory", "measure"], [cfg.folder.memory], inputs, launched=True)


def run_memory(cfg: RunConfig) -> dict[str, Any]:
    """Measure both kinds of training and write ``memory.json``. Collective.

    Raises:
        ValueError: the backend is not zero3, or the masks have not been projected.
    """
    if cfg.backend != "zero3":
        raise ValueError(f"backend={cfg.backend!r}: memory is measured under ZeRO-3; set --backend zero3")
    on_main(describe(cfg).check_inputs)
    path = prepare_base(cfg, "target")
    bench = Workbench.load(cfg, path)
    mask = Mask.load(cfg.folder.mask(cfg.tasks[0].name))
    batch_size = min(cfg.train.batch_size, EXAMPLES_PER_RANK * dist.world_size())
    stream = bench.batches(bench.tasks[:1], batch_size)
    masked, num_parameters, coded, num_copies = _masked(str(path), cfg, mask, next(stream))
    gc.collect()
    full = _full(str(path), MEASURED_LR, next(stream), num_parameters)
    measured = {"masked": sum(masked.values()), "full": sum(full.values())}
    result = {
        "bytes_per_param": measured,
        "predicted_bytes_per_param": {
            "masked": predicted(mask, cfg.train, num_parameters, coded, num_copies),
            "full": 16.0,
        },
        "categories": {"masked": masked, "full": full},
        "dtype": "bfloat16",
        "quantize": cfg.target.quantize,
        "density": mask.density,
        "trained_share": mask.num_entries / num_parameters,
        "granularity": mask.granularity,
        "num_ranks": dist.world_size(),
        "num_parameters": num_parameters,
    }
    if dist.is_main():
        write_json(cfg.folder.memory, result)
    outcome("model states: {masked:.2f} bytes per parameter masked, {full:.2f} full".format(**measured))
    return result


def predicted(mask: Mask, train: TrainConfig, num_parameters: int, coded: int, num_copies: int) -> float:
    """Bytes of masked training's states per parameter of a bf16 model, of all ranks together.

    Args:
        mask: what is trained.
        train: how its states are kept.
        num_parameters: of the model.
        coded: how many of them are 4-bit codes.
        num_copies: how often the ranks keep the mask's indices.
    """
    entries = mask.num_entries
    # The gradient; the master; what offloading stages, a value and its gradient; [Note: overlay] in sharding/overlay.py.
    of_each = 4 + 4 * train.master + (2 + 4) * (train.offload == "cpu") + 2 * (coded > 0)
    states = of_each * entries + 2 * moment_bytes(entries, train.state_dtype)
    owned = sum(mask.layouts[name].runs(units)[0].nbytes for name, units in mask.units.items())
    on_every_rank = mask.units.nbytes * num_copies * (dist.world_size() > 1)
    return 2 + (coded * (BYTES_PER_ELEMENT - 2) + states + owned + on_every_rank) / num_parameters


def _masked(path: str, cfg: RunConfig, mask: Mask, step: Step) -> tuple[dict[str, float], int, int, int]:
    """Bytes per parameter by category, the number of parameters, how many of them are 4-bit codes, and how often the ranks keep
    the mask's indices."""
    model = Zero3Model.from_pretrained(path, torch.bfloat16, cfg.target.quantize)
    learner = MaskedLearner(model, mask, replace(cfg.train, lr=MEASURED_LR, max_grad_norm=1.0))
    for _ in range(MEASURED_STEPS - 1):
        learner.accumulate(step)
        learner.step()
    learner.accumulate(step)
    numel = {name: torch.Size(model.shape(name)).numel() for name in model.names()}
    coded = sum(numel[name] for name, weight in named_weights(model.module) if isinstance(weight, NF4Linear))
    num_parameters = sum(numel.values())
    counted = bytes_per_param(learner.optimizer.model_states(), num_parameters)
    num_copies = 1 if model.index_shares() else dist.world_size()
    model.close()
    return counted, num_parameters, coded, num_copies


def _full(path: str, lr: float, step: Step, num_parameters: int) -> dict[str, float]:
    trainer = FullAdamW(path, torch.bfloat16, lr=lr)
    for _ in range(MEASURED_STEPS - 1):
        accumulate(step, trainer.module, trainer.backward, dist.local_device())
        trainer.step()
    accumulate(step, trainer.module, trainer.backward, dist.local_device())
    counted = bytes_per_param(trainer.states(), num_parameters)
    trainer.close()
    return counted
