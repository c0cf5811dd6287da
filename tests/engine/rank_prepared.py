"""Models that something else has prepared, trained in a loop that knows nothing of trace_dist but the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from engine.cases import CASES, Case, batches
from engine.training import make_optimizer, refused
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.train.loss import answer_nll_sum_
from trace_dist.utils import dist

CASE = CASES["everything-accumulated-recomputed"]
ROWS = CASES["row"]


def plain_loop(
    case: Case,
    model: nn.Module,
    optimizer: MaskedAdamW,
    run: nn.Module | None = None,
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> list[float]:
    """Losses over the global batch; ``run`` is called in place of the model where the caller wraps it later."""
    losses = []
    for batch in batches(case):
        ids, labels = (part.tensor_split(dist.world_size())[dist.rank()] for part in batch)
        num_tokens = int((batch[1][:, 1:] != -100).sum())
        total = torch.zeros((), dtype=torch.float64)
        for x, y in zip(
            ids.tensor_split(case.accumulation), labels.tensor_split(case.accumulation), strict=True
        ):
            loss = answer_nll_sum_((run or model)(input_ids=x).logits, y) / num_tokens
            backward(dist.world_size() * loss)  # data-parallel loops average over ranks
            total += loss.detach().double()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(dist.sum_over_ranks(total)))
    return losses


def by_hand(case: Case) -> nn.Module:
    """``fully_shard`` on every layer and on the whole, as its tutorial does."""
    model = case.model()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_accelerate(case: Case) -> nn.Module:
    """As ``Accelerator.prepare`` does it with an FSDP2 plugin (off on a CPU): embedding, tail and layers in groups."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="transformer_based_wrap",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.is_main(),
    )
    return fsdp2_prepare_model(accelerator, case.model())


def engine(case: Case, **config: Any) -> Any:
    """A DeepSpeed engine as a user makes it."""
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 500}
    options = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "steps_per_print": 10**9}
    return deepspeed.initialize(model=case.model(), config={**options, **config})[0]


def prepared(out: Path) -> dict[str, Any]:
    """Losses of every kind of preparation; what is refused, and why."""
    found: dict[str, Any] = {}
    makers: dict[str, Callable[[Case], nn.Module]] = {
        "plain": lambda case: case.model(),
        "ddp": lambda case: DistributedDataParallel(case.model()),
        "fully_shard": by_hand,
        "accelerate": by_accelerate,
    }
    for name, make in makers.items():
        for case in (CASE, ROWS):
            model = make(case)
            optimizer = make_optimizer(case, model)
            found[f"{name}/{case.name}"] = plain_loop(case, model, optimizer)
            entries = sum(len(grad) for grad in optimizer.model_states()["gradients"])
            found[f"{name}/{case.name} share"] = entries / optimizer.mask.num_entries
            found[f"{name}/{case.name} dense"] = sum(p.grad is not None for p in model.parameters())

    model = CASE.model()
    optimizer = make_optimizer(CASE, model)
    found["ddp later"] = plain_loop(CASE, model, optimizer, DistributedDataParallel(model))
    model = DistributedDataParallel(CASE.model(), static_graph=True)
    found["static graph"] = plain_loop(CASE, model, make_optimizer(CASE, model))
    model = CASE.model()
    optimizer = make_optimizer(CASE, model)
    static = DistributedDataParallel(model, static_graph=True)
    found["static graph later"] = plain_loop(CASE, model, optimizer, static)

    for case in (CASE, ROWS):
        theirs = engine(case)
        optimizer = make_optimizer(case, theirs)
        found[f"engine/{case.name}"] = plain_loop(case, theirs, optimizer, theirs.module)
        optimizer.model.detach()
    found["called"] = called()
    found["loaded"] = {name: loaded(name, make) for name, make in {**makers, "engine": engine}.items()}

    for name, make in {**makers, "engine": engine}.items():
        model = make(CASE)
        run = model.module if name == "engine" else model
        first = MaskedAdamW(model, Mask.random(CASE.model(), 0.3, "element", seed=7, maskable="all"))
        with torch.no_grad():
            run(input_ids=batches(CASE)[0][0])
        optimizer = make_optimizer(CASE, model)
        found[f"{name} again"] = plain_loop(CASE, model, optimizer, run)
        found[f"{name} first"] = refused(first.step)
        optimizer.model.detach()

    sharded = shard(CASE.model(), "zero3")
    found["loss.backward on zero3"] = plain_loop(CASE, sharded, make_optimizer(CASE, sharded))
    found["refused"] = refusals()
    found["join"] = {"shadowed": joined(False), "ended by the first": joined(True)}
    return found


def called() -> dict[str, Any]:
    """Losses where the engine itself is called, with its way of backward passes and without; what else its loop may ask of it."""
    found: dict[str, Any] = {}
    case = replace(CASE, steps=3)
    passes = case.accumulation
    ways: dict[str, tuple[int, Callable[[Any], Callable[[Tensor], Any]]]] = {
        "loss.backward": (1, lambda theirs: Tensor.backward),
        "engine.backward": (1, lambda theirs: theirs.backward),
        "accumulated by loss.backward": (passes, lambda theirs: lambda loss: (passes * loss).backward()),
        "accumulated by engine.backward": (
            passes,
            lambda theirs: lambda loss: theirs.backward(passes * loss),
        ),
    }
    for name, (steps, backward) in ways.items():
        theirs = engine(case, gradient_accumulation_steps=steps, wall_clock_breakdown=True)
        optimizer = make_optimizer(case, theirs)
        found[name] = plain_loop(case, theirs, optimizer, backward=backward(theirs))
    found["boundaries"] = boundaries(theirs, batches(case)[0][0])
    theirs.backward(theirs(input_ids=batches(case)[0][0]).logits.square().mean())
    reached = any(support.grad.any() for support in optimizer.supports)
    theirs.zero_grad()
    found["reset"] = bool(reached) and not any(support.grad.any() for support in optimizer.supports)
    found["engine.step"] = refused(theirs.step)
    found["clipping"] = clipping(case)
    return found


def clipping(case: Case) -> list[str]:
    """What is said of engines whose configs do not clip, and do."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("trace_dist.sharding.zero3")
    log.addHandler(listener)
    for config in ({}, {"gradient_clipping": 0.5}):
        make_optimizer(case, engine(case, **config)).model.detach()
    log.removeHandler(listener)
    return said


def boundaries(theirs: Any, ids: Tensor) -> list[bool]:
    """What an engine says of four more passes, after an evaluation: whether the loop is to step."""
    said = []
    for number in range(4):
        loss = theirs(input_ids=ids).logits.square().mean()
        theirs.backward(loss) if number % 2 else loss.backward()
        with torch.no_grad():
            theirs(input_ids=ids)
        said.append(theirs.is_gradient_accumulation_boundary())
    return said


def loaded(name: str, make: Callable[..., Any]) -> dict[str, int]:
    """Of a bf16 model that is loaded after the optimizer was built: copies taken anew in the steps before, and values that differ
    from what was loaded after steps that move nothing."""
    case = replace(CASES["bf16"], lr=0.0, weight_decay=0.0, steps=2)
    model = make(case, bf16={"enabled": True}) if name == "engine" else make(case)
    optimizer, taken = make_optimizer(case, model), []
    take = optimizer._loaded._take
    optimizer._loaded._take = lambda support: taken.append(support.name) or take(support)  # type: ignore[method-assign,func-returns-value]
    plain_loop(case, model, optimizer)
    before = len(taken)
    state = {key: value + 0.25 for key, value in case.model().state_dict().items()}
    if name == "engine":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for key, parameter in model.module.named_parameters():
                parameter.data.copy_(state[key])
    else:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(optimizer.model.module, dict(state), options=options)
    plain_loop(case, model, optimizer)
    now = optimizer.model.full_state_dict()
    return {"taken": before, "wrong": sum(int((now[key] != state[key]).sum()) for key in now)}


def another_seed() -> nn.Module:
    """One weight that was drawn on each rank."""
    model = CASE.model()
    with torch.no_grad():
        model.model.norm.weight.add_(dist.rank())
    return model


def joined(throws: bool) -> str:
    """What a pass in ``DDP.join`` is told, which may end once one rank has no more batches (``throws``)."""
    model = DistributedDataParallel(CASE.model())
    optimizer = make_optimizer(CASE, model)

    def train() -> None:
        with model.join(throw_on_early_termination=throws):
            model(input_ids=batches(CASE)[0][0]).logits.square().mean().backward()
            optimizer.step()

    return refused(train)


def refusals() -> dict[str, str]:
    """What MaskedAdamW says to models that it must not touch."""

    def attempt(model: nn.Module) -> str:
        return refused(lambda: MaskedAdamW(model, Mask.random(CASE.model(), 0.3, "row", seed=0)))

    adam = {"type": "AdamW", "params": {"torch_adam": True}}
    grid = init_device_mesh("cpu", (1, dist.world_size()), mesh_dim_names=("replicate", "shard"))
    import deepspeed

    alone = [torch.distributed.new_group([rank]) for rank in range(dist.world_size())][dist.rank()]
    apart = CASE.model()
    deepspeed.zero.Init(module=apart, data_parallel_group=alone)
    partly = CASE.model()
    fully_shard(partly.model.layers[0])
    return {
        "engine with an optimizer": attempt(engine(CASE, optimizer=adam, zero_allow_untested_optimizer=True)),
        "engine of stage 1": attempt(
            engine(CASE, optimizer=adam, zero_allow_untested_optimizer=True, zero_optimization={"stage": 1})
        ),
        "fsdp1": attempt(FullyShardedDataParallel(CASE.model(), device_id=torch.device("cpu"))),
        "hybrid": attempt(fully_shard(CASE.model(), mesh=grid)),
        "partly sharded": attempt(partly),
        "data parallel": attempt(nn.DataParallel(CASE.model())),
        "another seed": attempt(another_seed()),
        "cut for another group": refused(lambda: shard(apart, "zero3")),
    }
