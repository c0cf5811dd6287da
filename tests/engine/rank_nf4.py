"""Masked training on a 4-bit base, and the dense model that holds the same values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine.cases import CASES, Case, batches
from engine.resuming import run
from engine.training import train, train_step
from torch import Tensor
from transformers import PreTrainedModel

from trace_dist import Mask, MaskedAdamW, load_sharded, quantize_nf4
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.models.nf4 import NF4Linear
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

NAMES = ("element", "block-accumulated-recomputed", "row", "column", "qwen2-rows")


@dataclass(frozen=True)
class Dequantized(Case):
    """A case whose linear weights are what NF4 makes of them, in an ordinary model."""

    @classmethod
    def of(cls, name: str) -> Dequantized:
        case = CASES[name]
        return cls(**{each.name: getattr(case, each.name) for each in fields(case)})

    def model(self) -> PreTrainedModel:
        """The dense model."""
        dense, coded = super().model(), quantize_nf4(super().model())
        for name, layer in coded.named_modules():
            if isinstance(layer, NF4Linear):
                dense.get_submodule(name).weight.data.copy_(layer.weight)
        return dense


def coded(name: str) -> PreTrainedModel:
    """The 4-bit model of a case."""
    return quantize_nf4(CASES[name].model())


def codes(model: ShardedModel) -> dict[str, Tensor]:
    """This rank's part of all codes and scales, as bytes."""
    words = (name for name, _ in model.module.named_parameters() if name.endswith(("packed", "absmax")))
    return {name: model.local(name).view(torch.uint8).clone() for name in words}


def nf4(out: Path) -> dict[str, Any]:
    """Losses, norms and weights per backend and mask; whether codes stayed; two masks in a row."""
    backends: dict[str, Callable[[Any], ShardedModel]] = {
        "zero3": lambda module: Zero3Model(module, 500),
        "fsdp2": Fsdp2Model,
    }
    found: dict[str, Any] = {}
    folder = out / "nf4-base"
    if dist.is_main():
        CASES["qwen2-rows"].model().save_pretrained(folder)
    dist.barrier()
    for backend, build in backends.items():
        for name in NAMES:
            model = build(coded(name))
            before = codes(model)
            outcome = train(CASES[name], model)
            found[f"{backend}/{name}"] = {"losses": outcome.losses, "norms": outcome.norms}
            found[f"{backend}/{name}"] |= {"codes": same(before, codes(model)), "num_codes": len(before)}
            if outcome.state:
                torch.save(outcome.state, out / f"nf4-{backend}-{name}.pt")
        loaded = load_sharded(str(folder), "float32", backend, "nf4")
        found[f"{backend}/loaded"] = same(codes(loaded), codes(build(coded("qwen2-rows"))))
        found[f"{backend}/gathers"] = gathers(build)
        found[f"{backend}/deltas"] = deltas(build(coded("element")))
    if dist.world_size() == 2:  # dies after step 4, with a checkpoint at step 3
        run(Zero3Model(coded("element"), 500), CASES["element"], out / "nf4-relay", last=4)
    return found


class Logged(Comm):
    """Tells when gathers of overlays begin, and when somebody waits for them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._number = 0

    def gather_ahead(self, whole: Tensor, mine: Tensor) -> Any:
        number, self._number = self._number, self._number + 1
        self.log.append(f"begin {number}")
        work = super().gather_ahead(whole, mine)

        def wait() -> None:
            self.log.append(f"wait {number}")
            work.wait()

        return SimpleNamespace(wait=wait)


def gathers(build: Callable[[Any], ShardedModel]) -> dict[str, list[str]]:
    """What is gathered of the overlays of five blocks, of which the second one has none."""
    case = replace(CASES["element"], num_layers=5)
    model, comm = build(quantize_nf4(case.model())), Logged()
    model.comm = comm
    mask = Mask.random(model, 0.3, maskable=r"layers\.[0234]\..*_proj")
    optimizer = MaskedAdamW(model, mask, lr=1e-2)
    ids = batches(case)[0][0]

    def told() -> list[str]:
        said, comm.log = comm.log, []
        return said

    found = {}
    told()
    loss = model(input_ids=ids, labels=ids).loss
    found["forward"] = told()
    model.backward(loss)
    found["backward"] = told()
    optimizer.step()
    model(input_ids=ids)
    found["after a step"] = told()
    return found


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def deltas(model: ShardedModel) -> dict[str, bool]:
    """A task is trained, kept and taken off, a second one on another mask likewise; both come back bit for bit."""
    case = CASES["element"]
    ids = batches(case)[0][0]

    @torch.no_grad()
    def logits() -> Tensor:
        return model(input_ids=ids).logits

    plain, kept, seen = logits(), [], []
    for seed in (1, 2):
        mask = Mask.random(model, 0.1, "row" if seed == 2 else "element", seed=seed)
        base = extract_delta(model, mask, "base")
        optimizer = MaskedAdamW(model, mask, lr=1e-2)
        for batch in batches(case)[:3]:
            train_step(case, model, optimizer, batch)
        seen.append(logits())
        kept.append(extract_delta(model, mask, f"task {seed}"))
        optimizer.set_values(
            [base.values[s.name][s.offset :][: s.runs.num_entries] for s in optimizer.supports]
        )
        model.detach()
        model.release()
    found = {"base": torch.equal(logits(), plain)}
    for delta, wanted in zip(kept, seen, strict=True):
        with applied(model, delta):
            found[delta.task] = torch.equal(logits(), wanted) and not torch.equal(wanted, plain)
    found["off again"] = torch.equal(logits(), plain)
    found["released"] = all(
        layer.overlay is None for layer in model.module.modules() if isinstance(layer, NF4Linear)
    )
    return found
