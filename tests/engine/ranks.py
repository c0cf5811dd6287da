"""One rank of the engine's tests; every check of a world size in one launch, since a launch takes ten seconds.

    torchrun --nproc_per_node 2 ranks.py <out folder> <section> ...

Each rank writes ``<out>/rank<k>.json``: section -> what it found; rank 0 also safetensors with whole models.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine.cases import CASES, Case, batches
from engine.resuming import PLAIN, dropout_model, run
from engine.toy import train_toy
from engine.training import make_optimizer, train, train_reference, train_step
from safetensors.torch import save_file
from torch import Tensor

from trace_dist import Delta, Mask, MaskedAdamW
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.sharding.compaction import build_supports
from trace_dist.sharding.reduction import CompactReducer
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.train.checkpoint import latest_checkpoint
from trace_dist.utils import dist

Found = dict[str, Any]


def save_state(path: Path, state: dict[str, Tensor]) -> None:
    """Write a state dict on the rank that has one; tied tensors once per name."""
    if state:
        save_file({name: value.clone() for name, value in state.items()}, str(path))


def refused(action: Callable[[], object]) -> str:
    """The message of the ValueError that ``action`` raises; empty when it does not."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


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


class WithoutRelease(Zero3Model):
    """Leaves what backward gathered, as it would be without ``after_backward``."""

    def after_backward(self) -> None:
        """Nothing."""


class WithoutRefresh(Zero3Model):
    """Leaves gathered copies as they were before the update."""

    def refresh(self, names: Any) -> None:
        """Nothing."""


class WithoutReleaseLenient(WithoutRelease):
    """Refreshes what is persistent only: what a release would have freed stays."""

    def refresh(self, names: Any) -> None:
        super().refresh([name for name in names if self._parameters[name].ds_persist])


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
        case = replace(CASES["element-everything"], threshold=threshold)
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
    """Masks that the ranks do not agree on, and gradients taken behind the model's back."""
    case = CASES["element"]
    model = Zero3Model(case.model(), case.threshold)
    found: Found = {}
    mine = Mask.random(model, 0.3, "element", seed=dist.rank())
    found["different"] = refused(lambda: MaskedAdamW(model, mine))
    optimizer = make_optimizer(case, model)
    model(input_ids=batches(case)[0][0]).logits.square().mean().backward()
    found["plain_backward"] = refused(optimizer.step)
    return found


def reduction(out: Path) -> Found:
    """Sums over ranks in several orders of arrival; bytes on the wire."""
    model = Zero3Model(CASES["element-everything"].model(), 0)
    supports = build_supports(model, Mask.random(model, 0.3, "element", seed=1, maskable="all"))
    for support in supports:
        support.grad = torch.zeros(support.runs.num_entries)
    rank, world = dist.rank(), dist.world_size()
    base = {s.name: torch.arange(s.whole.num_entries, dtype=torch.float32) for s in supports}

    def contribution(name: str, of_rank: int) -> Tensor:
        return (base[name] % 13 + 1) * 10**of_rank  # integers: sums are exact

    backwards = list(reversed(supports))
    orders = {
        "in order": lambda _: backwards,
        "reversed": lambda _: supports,
        "twice": lambda _: backwards + backwards[::3],
        "missing on the last rank": lambda r: [s for i, s in enumerate(backwards) if r < world - 1 or i % 3],
        "missing everywhere": lambda _: backwards[::2],
        "late on the last rank": lambda r: backwards[1:] + backwards[:1] if r == world - 1 else backwards,
    }
    found: Found = {}
    for bucket_bytes in (64, 2000, 2**25):
        reducer = CompactReducer(supports, lambda s, values: s.grad.add_(values), bucket_bytes)
        for name, order in orders.items():
            for support in supports:
                support.grad.zero_()
            for _ in range(2):  # a second backward adds to the first
                for support in order(rank):
                    reducer.add(support, contribution(support.name, rank))
                reducer.finish()
            wrong = 0
            for s in supports:
                whole = sum(order(r).count(s) * contribution(s.name, r) for r in range(world))
                whole = torch.as_tensor(whole, dtype=torch.float32).expand(s.whole.num_entries)
                wrong += not torch.equal(s.grad, 2 * whole[s.offset : s.offset + s.runs.num_entries])
            found[f"{name}/{bucket_bytes}"] = wrong
    found["unreduced"] = reducer.has_unreduced
    found["bytes"] = {d: bytes_of_one_backward(d) for d in (0.05, 1.0)}
    return found


def bytes_of_one_backward(density: float) -> int:
    """What this rank sends for the gradients of the linear layers."""
    case = CASES["element"]
    model = Zero3Model(case.model(), 0)
    model.attach(Mask.random(model, density, "element", seed=1))
    assert model._compactor is not None
    reducer = model._compactor._reducer
    model.backward(model(input_ids=batches(case)[0][0]).logits.square().mean())
    return reducer.bytes_sent


def toy(out: Path) -> Found:
    """A layer used twice, a layer skipped on one rank."""
    return {granularity: train_toy(granularity) for granularity in ("element", "row")}


def cut_and_continue(out: Path) -> Found:
    """Uninterrupted, and cut after step 5 and continued from step 3 in a new model: same ranks, with dropout."""
    case = CASES["gpt2-conv1d"]

    def start(seed: int) -> Zero3Model:
        torch.manual_seed(seed + dist.rank())
        return Zero3Model(dropout_model(), case.threshold)

    whole = run(start(100), case, out / "uncut")
    cut = run(start(100), case, out / "cut", last=5)
    continued = run(start(200), case, out / "cut")
    assert whole is not None
    assert continued is not None
    return {
        "died": cut is None,
        "losses": [list(map(list, r.losses.items())) for r in (whole, continued)],
        "weights": all(torch.equal(value, continued.state[name]) for name, value in whole.state.items()),
        "optimizer": all(map(torch.equal, whole.optimizer, continued.optimizer)),
        "kept": sorted(path.name for path in (out / "cut").iterdir()),
    }


def hand_over(out: Path) -> Found:
    """The first leg of a relay over world sizes: die after step 4, with a checkpoint at step 3. And a run to the end."""
    run(Zero3Model(PLAIN.model(), PLAIN.threshold), PLAIN, out / "relay", last=4)
    whole = run(Zero3Model(PLAIN.model(), PLAIN.threshold), PLAIN, None)
    assert whole is not None
    return {"losses": list(whole.losses.values())}


def take_over(out: Path) -> Found:
    """The last leg of the relay: continue what lies in ``relay``."""
    last = run(Zero3Model(PLAIN.model(), PLAIN.threshold), PLAIN, out / "relay")
    assert last is not None
    save_state(out / "relay.safetensors", last.state)
    return {"losses": list(map(list, last.losses.items()))}


def damaged(out: Path) -> Found:
    """A truncated file: an error on every rank, though only one of them reads the file."""
    folder = latest_checkpoint(out / "uncut")
    assert folder is not None
    if dist.is_main():
        shutil.copytree(folder, out / "damaged" / folder.name)
        file = out / "damaged" / folder.name / "rank-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    dist.barrier()
    case = CASES["gpt2-conv1d"]
    model = Zero3Model(dropout_model(), case.threshold)
    return {"error": refused(lambda: run(model, case, out / "damaged"))}


def deltas(out: Path) -> Found:
    """Extract, save, put back, apply, restore; fp32 and bf16."""
    found: Found = {}
    for dtype in ("float32", "bfloat16"):
        case = replace(CASES["element-everything"], dtype=dtype, density=0.05)
        model = Zero3Model(case.model(), case.threshold)
        ids = batches(case)[0][0]
        base = copy.deepcopy(model.full_state_dict())
        mask = case.mask(model)
        snapshot = Snapshot(model, mask)
        tuned = train(case, model).state
        delta = extract_delta(model, mask, "tuned")
        logits = forward(model, ids)
        snapshot.restore()
        restored = model.full_state_dict()
        path = out / f"delta-{dtype}.safetensors"
        if dist.is_main():
            delta.save(path)
        dist.barrier()
        with applied(model, Delta.load(path)):
            inside = model.full_state_dict()
            same_logits = torch.equal(forward(model, ids), logits)
        after = model.full_state_dict()
        save_state(out / f"tuned-{dtype}.safetensors", tuned)
        found[dtype] = {
            "changed": any(not torch.equal(tuned[name], value) for name, value in base.items()),
            "restored": all(torch.equal(restored[name], value) for name, value in base.items()),
            "inside": all(torch.equal(inside[name], value) for name, value in tuned.items()),
            "after": all(torch.equal(after[name], value) for name, value in base.items()),
            "logits": same_logits,
        }
        model.close()
    return found


@torch.no_grad()
def forward(model: Zero3Model, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def exporting(out: Path) -> Found:
    """``save_pretrained`` of a sharded model."""
    module = CASES["element-everything"].model()
    module.generation_config.max_length = 77
    model = Zero3Model(module, 0)
    model.save_pretrained(out / "exported")
    save_state(out / "exported.safetensors", model.full_state_dict())
    return {}


SECTIONS: dict[str, Callable[[Path], Found]] = {
    "parity": parity,
    "traps": traps,
    "interleaving": interleaving,
    "attaching": attaching,
    "reduction": reduction,
    "toy": toy,
    "cut_and_continue": cut_and_continue,
    "damaged": damaged,
    "hand_over": hand_over,
    "take_over": take_over,
    "deltas": deltas,
    "exporting": exporting,
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
