"""One rank's checks of everything that goes through files: checkpoints, deltas, loading and export."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from engine.cases import CASES, Case, batches
from engine.resuming import PLAIN, dropout_model, run
from engine.savable import make
from engine.training import refused, save_state, train
from torch import Tensor

from trace_dist import Delta, Mask, MaskedAdamW, load_sharded
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.checkpoint import Background, latest_checkpoint, load_checkpoint, load_mask, save_checkpoint
from trace_dist.sharding.dense import FullAdamW
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import PERSISTENCE_THRESHOLD, Zero3Model
from trace_dist.utils import dist

Found = dict[str, Any]


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


def other_backends(out: Path) -> Found:
    """Step 3 of ZeRO-3 continued by FSDP2, and step 3 of FSDP2 continued by ZeRO-3 and, later, by one process."""
    run(Fsdp2Model(PLAIN.model()), PLAIN, out / "of-fsdp2", last=4)
    if dist.is_main():
        shutil.copytree(out / "relay", out / "to-fsdp2")
        shutil.copytree(out / "of-fsdp2", out / "to-zero3")
    dist.barrier()
    onward = {
        "to-fsdp2": run(Fsdp2Model(PLAIN.model()), PLAIN, out / "to-fsdp2"),
        "to-zero3": run(Zero3Model(PLAIN.model(), PLAIN.threshold), PLAIN, out / "to-zero3"),
    }
    found: Found = {}
    for name, result in onward.items():
        assert result is not None
        found[name] = list(map(list, result.losses.items()))
        save_state(out / f"{name}.safetensors", result.state)
    return found


def background(out: Path) -> Found:
    """Written beside training: named only when every rank has written; an error of one rank is one of all."""
    model = Zero3Model(PLAIN.model(), PLAIN.threshold)
    optimizer, writer, gate = MaskedAdamW(model, PLAIN.mask(model)), Background(), Event()
    if dist.rank() == 1:
        writer._thread.submit(gate.wait)
    folder = save_checkpoint(out / "background", 1, optimizer, {}, write=writer.save)
    if dist.rank() == 0:
        wait([writer._work])
    for _ in range(3):
        writer.attend()
    early = folder.exists()
    gate.set()
    writer.finish()
    found: Found = {
        "early": early,
        "whole": latest_checkpoint(out / "background") == folder,
        "files": sorted(path.name for path in folder.iterdir()),
    }
    if dist.rank() == 1:
        optimizer.compact()[0][1]["exp_avg"][0] = float("nan")
    save_checkpoint(out / "background", 2, optimizer, {}, write=writer.save)
    # in step whatever the other rank's thread is at
    wait([writer._work])
    dist.barrier()
    found["error"] = refused(writer.attend)
    dist.barrier()
    found["left"] = sorted(path.name for path in (out / "background").iterdir())
    writer.close()
    return found


def damaged(out: Path) -> Found:
    """A truncated file: an error on every rank, though only one of them reads the file; and none is passed over alone."""
    folder = latest_checkpoint(out / "uncut")
    assert folder is not None
    if dist.is_main():
        shutil.copytree(folder, out / "damaged" / folder.name)
        file = out / "damaged" / folder.name / "rank-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    dist.barrier()
    model = Zero3Model(dropout_model(), CASES["gpt2-conv1d"].threshold)
    optimizer = MaskedAdamW(model, load_mask(folder))
    error = refused(lambda: load_checkpoint(out / "damaged" / folder.name, optimizer))
    return {
        "error": error,
        "latest": str(latest_checkpoint(out / "damaged")),
        "unwritten": not_finite(out, optimizer),
    }


def not_finite(out: Path, optimizer: MaskedAdamW) -> str:
    """What every rank is told of a moment that is NaN on rank 1 alone."""
    if dist.rank() == 1:
        optimizer.compact()[0][1]["exp_avg"][0] = float("nan")
    error = refused(lambda: save_checkpoint(out / "never", 1, optimizer, {}))
    return f"{error} {(out / 'never').exists()}"


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
    for backend, kind in (("zero3", Zero3Model), ("fsdp2", Fsdp2Model)):
        for name in ("causal", "classifier", "encoder without pooler"):
            kind(make(name, torch.bfloat16)).save_pretrained(out / f"saved-{backend}-{name}")
    return {"no folder": refused(lambda: model.save_pretrained(out / "exported.safetensors"))}


def full_density(case: Case) -> list[float]:
    """Losses of masked training with a mask that selects everything, at the settings of ``FullAdamW``."""
    model = Zero3Model(case.model())
    everything = Mask.random(model, 1.0, "element", maskable="all")
    optimizer = MaskedAdamW(model, everything, lr=1e-3, weight_decay=1e-2, max_grad_norm=1.0)
    losses = []
    for ids, _ in batches(case):
        mine = ids.tensor_split(dist.world_size())[dist.rank()]
        loss = model(input_ids=mine, labels=mine).loss
        model.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(dist.sum_over_ranks(loss.detach()) / dist.world_size()))
    return losses


def loading(out: Path) -> Found:
    """A checkpoint loaded into shards trains as the model does that was sharded; so does every parameter under DeepSpeed."""
    folder = out / "checkpoint"
    base = replace(CASES["qwen2-biases"], threshold=PERSISTENCE_THRESHOLD)
    if dist.is_main():
        base.model().save_pretrained(folder)
    dist.barrier()
    found: Found = {}
    for dtype in ("float32", "bfloat16"):
        case = replace(base, dtype=dtype)
        loaded = load_sharded(str(folder), dtype, "zero3").train()
        found[dtype] = [train(case, model).losses for model in (loaded, Zero3Model(case.model()))]
    dense = FullAdamW(str(folder), torch.float32, lr=1e-3)
    losses = []
    for ids, _ in batches(base):
        mine = ids.tensor_split(dist.world_size())[dist.rank()]
        loss = dense.module(input_ids=mine, labels=mine).loss
        dense.backward(loss)
        dense.step()
        losses.append(float(dist.sum_over_ranks(loss.detach()) / dist.world_size()))
    found["full"] = losses
    found["full density"] = full_density(base)
    found["full_states"] = {name: sum(t.nbytes for t in tensors) for name, tensors in dense.states().items()}
    dense.close()
    return found
