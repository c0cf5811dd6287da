"""One rank of the engine's tests; every check of a world size in one launch, since a launch takes ten seconds.

    torchrun --nproc_per_node 2 ranks.py <out folder> <section> ...

Each rank writes ``<out>/rank<k>.json``: section -> what it found; rank 0 also safetensors with whole models.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.cases import CASES, Case, batches
from engine.comms import CountedComm
from engine.looking import looking
from engine.rank_by_weight import by_weight
from engine.rank_depth import depth
from engine.rank_files import (
    background,
    cut_and_continue,
    damaged,
    deltas,
    exporting,
    hand_over,
    loading,
    other_backends,
    take_over,
)
from engine.rank_gathering import gathering
from engine.rank_gloo import gathering_over_gloo
from engine.rank_held import holding
from engine.rank_nf4 import nf4
from engine.rank_prepared import prepared
from engine.rank_reduction import reduction
from engine.rank_shared import shared
from engine.rank_spoilt import spoilt
from engine.rank_unreached import unreached
from engine.rank_wire import wire
from engine.rank_withheld import withheld
from engine.toy import train_toy
from engine.training import make_optimizer, refused, save_state, train, train_reference, train_step
from torch import Tensor

from trace_dist import Delta, Mask, MaskedAdamW
from trace_dist.bank.delta import applied, extract_delta
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.support import build_supports
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

Found = dict[str, Any]


def parity(out: Path) -> Found:
    """Every case: losses, norms, and how the shard edges lie."""
    found = {}
    for case in CASES.values():
        model = Zero3Model(case.model(), case.threshold)
        mask = case.mask(model)
        supports = build_supports(model, mask)
        outcome = train(case, model)
        save_state(out / f"{case.name}.safetensors", outcome.state)
        found[case.name] = {
            "losses": outcome.losses,
            "norms": outcome.norms,
            "mask": mask.digest(),
            "cut_runs": sum(bool(s.runs.skip or s.runs.tail) for s in supports),
            "cut_rows": sum(
                len(s.shape) > 1 and bool(s.runs.base % s.shape[-1]) and s.runs.num_entries > 0
                for s in supports
            ),
            "owns_nothing": sum(0 in s.splits for s in supports),
        }
        model.close()
    return found


def fsdp2(out: Path) -> Found:
    """The parity cases under FSDP2; evaluation between steps, and a load from disk, leave no stale copy behind."""
    found: Found = {}
    for case in CASES.values():
        model = Fsdp2Model(case.model())
        outcome = train(case, model)
        save_state(out / f"fsdp2-{case.name}.safetensors", outcome.state)
        found[case.name] = {"losses": outcome.losses, "norms": outcome.norms}
    found["hooks alone"] = hooks_alone()
    case = CASES["element-everything"]
    if dist.is_main():
        case.model().save_pretrained(out / "fsdp2-base")
    dist.barrier()
    model = Fsdp2Model.from_pretrained(str(out / "fsdp2-base"), torch.float32)
    share = sum(len(model.local(name)) for name in model.names())
    found["loaded"] = {"losses": train(case, model).losses, "share": share}
    return found


def hooks_alone() -> dict[str, Any]:
    """A mask of norms, whose gradients FSDP2 reduces itself: what our exchange sends, and whether all entries have a gradient."""
    model = Fsdp2Model(CASES["element"].model())
    model.comm = comm = CountedComm()
    optimizer = MaskedAdamW(model, Mask.random(model, 1.0, "element", maskable="norm"))
    ids = batches(CASES["element"])[0][0].to(model.device)
    model.backward(model(input_ids=ids).logits.square().mean())
    return {"sent": comm.bytes_sent, "trained": all(bool(s.grad.all()) for s in optimizer.supports)}


class WithoutRelease(Zero3Model):
    """Leaves what backward gathered, as it would be without ``after_backward``."""

    def after_backward(self) -> None:
        """Nothing."""


class WithoutRefresh(Zero3Model):
    """Leaves gathered copies as they were before the update."""

    def refresh(self, supports: Any) -> None:
        """Nothing."""


class WithoutReleaseLenient(WithoutRelease):
    """Refreshes what is persistent only: what a release would have freed stays."""

    def refresh(self, supports: Any) -> None:
        super().refresh([s for s in supports if self._parameters[s.name].ds_persist])


def traps(out: Path) -> Found:
    """Losses with a mitigation taken away ([Note: stale gathers] in sharding/zero3.py)."""
    element = CASES["element"]
    setups: dict[str, tuple[Case, type[Zero3Model]]] = {
        "embedding": (replace(element, maskable="embed", density=1.0, threshold=0), WithoutReleaseLenient),
        "lowest-layer": (
            replace(element, maskable=r"layers\.0.*q_proj", density=1.0, threshold=0),
            WithoutReleaseLenient,
        ),
        "norms": (replace(element, maskable="norm", density=1.0), WithoutRefresh),
        "small-matrices": (replace(element, threshold=10**5), WithoutRefresh),
    }
    found: Found = {}
    for name, (case, broken) in setups.items():
        for kind, backend in (("right", Zero3Model), ("broken", broken)):
            model = backend(case.model(), case.threshold)
            optimizer = make_optimizer(case, model)
            losses = [train_step(case, model, optimizer, batch) for batch in batches(case)]
            found.setdefault(name, {})[kind] = losses
            gathered = [p for p in model._parameters.values() if p.ds_status.name != "NOT_AVAILABLE"]
            found[name][f"{kind}_gathered"] = sum(not p.ds_persist for p in gathered)
            model.detach()
        found[name]["reference"] = train_reference(case).losses if dist.is_main() else []
    case = setups["embedding"][0]
    model = WithoutRelease(case.model(), case.threshold)
    optimizer = make_optimizer(case, model)
    model.backward(model(input_ids=batches(case)[0][0]).logits.square().mean())
    try:
        optimizer.step()
    except RuntimeError as error:
        found["refusal"] = str(error)
    return found


def interleaving(out: Path) -> Found:
    """Training with evaluation, generation, swapped deltas and exports in between, against training alone."""
    found: Found = {}
    for threshold in (0, 500):
        case = replace(CASES["element-everything"], threshold=threshold, steps=6)
        for disturbed in (False, True):
            model = Zero3Model(case.model(), threshold)
            optimizer = make_optimizer(case, model)
            losses = []
            for step, batch in enumerate(batches(case)):
                losses.append(train_step(case, model, optimizer, batch))
                if disturbed:
                    found[f"disturbance-{threshold}-{step}"] = disturb(model, batch[0], step)
            found[f"losses-{threshold}-{disturbed}"] = losses
            model.close()
    return found


@torch.no_grad()
def disturb(model: Zero3Model, ids: Tensor, step: int) -> bool:
    """What users do between steps; whether every answer was right."""
    model.eval()
    before = model(input_ids=ids).logits
    right = True
    if step % 3 == 0:
        other = extract_delta(model, Mask.random(model, 0.2, "row", seed=9, maskable="all"), "other")
        louder = Delta(other.mask, {name: 2 * values for name, values in other.values.items()}, "louder")
        with applied(model, louder):
            right = not torch.equal(model(input_ids=ids).logits, before)
    elif step % 3 == 1:
        model.module.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False)
    else:
        state = model.full_state_dict()
        right = all(value.numel() > 0 for value in state.values())
    right = right and torch.equal(model(input_ids=ids).logits, before)
    model.train()
    return right


def attaching(out: Path) -> Found:
    """Masks that the ranks do not agree on."""
    case = CASES["element"]
    model = Zero3Model(case.model(), case.threshold)
    found: Found = {}
    mine = Mask.random(model, 0.3, "element", seed=dist.rank())
    found["different"] = refused(lambda: MaskedAdamW(model, mine))
    same = Mask.random(model, 0.3, "element", seed=0)
    found["rate"] = refused(lambda: MaskedAdamW(model, same, lr=0.1 + dist.rank()))
    return found


def shared_memory(out: Path) -> Found:
    """Files of this job under /dev/shm, the operator that would lay them there, and whether operators were tried."""
    import deepspeed

    port = os.environ.get("MASTER_PORT", "")
    left = [path.name for path in Path("/dev/shm").glob(f"deepspeed*_{port}_*")]
    tried = "__compatible_ops__" in vars(deepspeed.ops)
    return {"left": left, "operator": repr(deepspeed.comm.comm.cdb.shm_comm_op), "tried": tried}


def toy(out: Path) -> Found:
    """A layer used twice, a layer skipped on one rank."""
    return {granularity: train_toy(granularity) for granularity in ("element", "row")}


SECTIONS: dict[str, Callable[[Path], Found]] = {
    "parity": parity,
    "prepared": prepared,
    "fsdp2": fsdp2,
    "traps": traps,
    "interleaving": interleaving,
    "attaching": attaching,
    "reduction": reduction,
    "withheld": withheld,
    "shared": shared,
    "toy": toy,
    "depth": depth,
    "gathering": gathering,
    "gathering_over_gloo": gathering_over_gloo,
    "holding": holding,
    "by_weight": by_weight,
    "unreached": unreached,
    "wire": wire,
    "nf4": nf4,
    "cut_and_continue": cut_and_continue,
    "looking": looking,
    "spoilt": spoilt,
    "damaged": damaged,
    "background": background,
    "hand_over": hand_over,
    "other_backends": other_backends,
    "take_over": take_over,
    "deltas": deltas,
    "exporting": exporting,
    "loading": loading,
    "shared_memory": shared_memory,
}


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    out, sections = Path(arguments[0]), arguments[1:]
    dist.ensure_group()
    found = {section: SECTIONS[section](out) for section in sections}
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    main()
