"""One rank's checks of tools that save rank 0's optimizer state alone, and wrap a model after the optimizer was built."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from engine.cases import CASES, Case, batches
from engine.training import refused
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from trace_dist import Mask, MaskedAdamW
from trace_dist.utils import dist

CASE = replace(CASES["element"], steps=8)
BF16 = replace(CASES["bf16"], steps=8)
LATE = {"linear": "linear", "norms": ".*norm.*", "everything": "all"}
"""What is masked -> the patterns of ``Mask.random``."""
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit": {"state_dtype": "8bit"},
    "no master": {"master": False},
    "offloaded": {"offload": "cpu"},
}
ROWS = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids, _ in batches(CASE)] * 2


def make(model: nn.Module, case: Case, maskable: str = "linear", **options: Any) -> MaskedAdamW:
    mask = Mask.random(case.model(), 0.3, "element", seed=1, maskable=maskable)
    return MaskedAdamW(model, mask, lr=1e-2, eps=1e-5, **options)


def step(run: nn.Module, optimizer: MaskedAdamW, number: int) -> None:
    """A step of a data-parallel loop on a batch of two examples, one per rank or both on one."""
    ids = batches(CASE)[number][0][:2]
    mine = ids.tensor_split(dist.world_size())[dist.rank()]
    run(input_ids=mine, labels=mine).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train(folder: Path, resume: str | None) -> tuple[PreTrainedModel, Trainer]:
    """transformers' Trainer, with a mask of linear layers; Trainer puts DDP around the model."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    model = CASE.model()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        data_collator=default_data_collator,
        optimizers=(make(model, CASE), None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def by_trainer(out: Path) -> dict[str, Any]:
    """A run without a break, and one continued from its checkpoint after two steps."""
    whole, trainer = train(out / "trainer", None)
    continued, _ = train(out / "trainer", str(out / "trainer" / "checkpoint-2"))
    start = CASE.model().state_dict()
    return {
        "ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "equal": all(map(torch.equal, whole.parameters(), continued.parameters())),
        "changed": sorted(n for n, p in whole.named_parameters() if not torch.equal(p, start[n])),
        "masked": sorted(Mask.random(whole, 0.3, "element", seed=1)),
    }


def by_accelerate(out: Path) -> dict[str, Any]:
    """Optimizer first, then everything prepared at once; 8-bit states."""
    accelerator = Accelerator(cpu=True)
    model = CASE.model()
    optimizer = make(model, CASE, state_dtype="8bit")
    run, prepared = accelerator.prepare(model, optimizer)
    step(run, prepared, 0)
    accelerator.save_state(str(out / "accelerate"))
    step(run, prepared, 1)
    expected = [p.detach().clone() for p in model.parameters()]
    accelerator.load_state(str(out / "accelerate"))
    step(run, prepared, 1)
    return {
        "ddp": isinstance(run, DistributedDataParallel),
        "equal": all(map(torch.equal, model.parameters(), expected)),
    }


def tensors(optimizer: MaskedAdamW) -> list[Tensor]:
    """What this rank keeps, in a fixed order."""
    kept = [state[key] for _, state in optimizer.compact() for key in sorted(state) if key != "step"]
    return [tensor.clone() for tensor in (*kept, *map(optimizer.values, optimizer.supports))]


def alone(out: Path, name: str, **options: Any) -> dict[str, Any]:
    """Rank 0 saves after step 3 while the others go on to step 4; each rank keeps its own part aside."""
    model = BF16.model()
    optimizer = make(model, BF16, **options)
    run = DistributedDataParallel(model)
    for number in range(3):
        step(run, optimizer, number)
    torch.save(tensors(optimizer), out / f"{name}-{dist.rank()}.pt")
    if dist.is_main():
        time.sleep(0.2)
        torch.save(optimizer.state_dict(), out / f"{name}.pt")
    step(run, optimizer, 3)
    torch.save([p.detach() for p in model.parameters()], out / f"{name}-weights-{dist.rank()}.pt")
    saved = torch.load(out / f"{name}.pt", weights_only=True)
    model = BF16.model()
    again = make(model, BF16, **options)
    again.load_state_dict(saved)
    own = torch.load(out / f"{name}-{dist.rank()}.pt", weights_only=True)
    restored = all(map(torch.equal, tensors(again), own))
    step(DistributedDataParallel(model), again, 3)
    return {
        "restored": restored,
        "continued": all(map(torch.equal, tensors(again), tensors(optimizer))),
    }


def wrapped_late(maskable: str) -> dict[str, Any]:
    """What DDP, put around the model after the optimizer was built, keeps and does."""
    model = CASE.model()
    optimizer = make(model, CASE, maskable)
    run = DistributedDataParallel(model, bucket_cap_mb=1)
    for number in range(2):
        step(run, optimizer, number)
    twin = CASE.model()
    first = make(DistributedDataParallel(twin.requires_grad_(True)), CASE, maskable)
    for number in range(2):
        step(first.model.roots[-1], first, number)
    bucketed = [p for n, p in model.named_parameters() if n not in run.parameters_to_ignore]
    optimizer.model.detach()
    return {
        "bucketed": len(bucketed),
        "equal": all(map(torch.equal, model.parameters(), twin.parameters())),
        "dense": sum(p.grad is not None for p in model.parameters()),
        "unfrozen": sum(p.requires_grad for p in model.parameters()),
        "ignored": len(model._ddp_params_and_buffers_to_ignore),
    }


def beside() -> dict[str, str]:
    """What is said to a loop that trains or clips, beside the mask, what its ranks would not do together."""
    model = CASE.model()
    optimizer = make(model, CASE)
    run = DistributedDataParallel(model)
    step(run, optimizer, 0)
    clipped = refused(lambda: torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0))
    model.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        run(input_ids=batches(CASE)[0][0])
    return {"clipped": clipped, "trained": refused(lambda: step(run, optimizer, 1))}


def scaled() -> dict[str, Any]:
    """A GradScaler's scale and what its steps change, where the gradients of rank 1 overflow once."""
    model = CASE.model()
    optimizer, scaler = make(model, CASE), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    changed, scales = [], []
    for number in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        ids = batches(CASE)[number][0][:2].tensor_split(2)[dist.rank()]
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        if number == 0 and dist.rank() == 1:
            optimizer.supports[0].grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        changed.append(not all(map(torch.equal, model.parameters(), before)))
        scales.append(scaler.get_scale())
    return {"changed": changed, "scales": scales}


def main(out: Path) -> None:
    dist.init_distributed()
    datasets.disable_progress_bars()
    found: dict[str, Any] = {"trainer": by_trainer(out), "accelerate": by_accelerate(out)}
    found["alone"] = {name: alone(out, name, **options) for name, options in OPTIONS.items()}
    found["late"] = {name: wrapped_late(maskable) for name, maskable in LATE.items()}
    found["beside"], found["scaled"] = beside(), scaled()
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    last = make(CASE.model(), CASE)
    if dist.is_main():  # rank 1 is through with the script meanwhile
        time.sleep(2)
        torch.save(last.state_dict(), out / "last.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
