"""What a user would do instead: sequential full fine-tuning, and sequential PEFT LoRA. Dense, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trace_dist.config import RunConfig
from trace_dist.continual.judge import Judge
from trace_dist.continual.sequence import finish_mode
from trace_dist.masks.ops import layouts_for
from trace_dist.models.loading import load_model
from trace_dist.train.learner import DenseLearner
from trace_dist.train.loop import MetricLog, train_steps
from trace_dist.train.loss import autocast
from trace_dist.train.workbench import Workbench


def lora_rank(module: PreTrainedModel, cfg: RunConfig) -> int:
    """The rank at which LoRA on every linear layer (PEFT knows no fused experts) trains as many parameters as the masks do."""
    if cfg.continual.lora_rank is not None:
        return cfg.continual.lora_rank
    wanted = cfg.mask.density * sum(
        layout.numel for layout in layouts_for(module, "element", 1, cfg.mask.maskable).values()
    )
    linear = layouts_for(module, "element", 1, "linear").values()
    return max(1, round(wanted / sum(sum(layout.shape) for layout in linear if len(layout.shape) == 2)))


def _with_lora(module: PreTrainedModel, cfg: RunConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model  # slow to import, and needed here alone

    rank = lora_rank(module, cfg)
    torch.manual_seed(cfg.seed)  # the adapters' random halves
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(module, config)


def run_baseline(cfg: RunConfig, bench: Workbench, path: Path | str, mode: str) -> None:
    """Train the tasks one after the other with ``full`` or ``lora`` and write the mode's result."""
    module: Any = load_model(path, torch.float32)  # a bf16 copy without a master would stall; see `autocast`
    total = sum(parameter.numel() for parameter in module.parameters())
    facts: dict[str, Any] = {}
    if mode == "lora":
        facts["lora_rank"] = lora_rank(module, cfg)
        module = _with_lora(module, cfg)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    else:
        parameters = list(module.parameters())
    judge = Judge(cfg, bench)
    with autocast(cfg.target.dtype):
        rows = [judge.score(module)]
    trained = []
    for stream in bench.tasks:
        name = f"{mode}/{stream.task.name}"
        lr = cfg.continual.lora_lr if mode == "lora" else cfg.continual.full_lr
        learner = DenseLearner(module, parameters, cfg.train, lr, cfg.target.dtype)
        log = MetricLog(Path(cfg.run_dir), name)
        batches = bench.batches([stream], cfg.train.batch_size)
        trained.append(train_steps(learner, batches, cfg.train, stream.steps, description=name, log=log))
        log.close()
        with autocast(cfg.target.dtype):
            rows.append(judge.score(module))
    trainable = sum(parameter.numel() for parameter in parameters)
    finish_mode(
        cfg, mode, judge, rows, trained, {**facts, "trainable": trainable, "density": trainable / total}
    )
