"""MaskedAdamW on whole models: equal to torch's AdamW at full density, a plain optimizer to schedulers and loops."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from engine.cases import CASES, batches
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from transformers import PreTrainedModel, get_scheduler

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import ShardedModel
from trace_dist.sharding.zero3 import load_deepspeed

HYPER = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
BATCHES = [batch[0] for batch in batches(replace(CASES["element"], steps=25))]


def full_mask(model: ShardedModel, granularity: str) -> Mask:
    mask = Mask.random(model, 1.0, granularity, seed=0, maskable="all")
    assert mask.num_entries == sum(parameter.numel() for parameter in model.module.parameters())
    return mask


def train_dense(model: PreTrainedModel, max_grad_norm: float | None) -> list[float]:
    """torch.optim.AdamW in a plain loop; the clip norm is summed in float64."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **HYPER)
    losses = []
    for ids in BATCHES:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if max_grad_norm is not None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
            for grad in grads:
                grad.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_masked(model: PreTrainedModel, granularity: str, max_grad_norm: float | None) -> list[float]:
    sharded = shard(model, "single")
    optimizer = MaskedAdamW(sharded, full_mask(sharded, granularity), max_grad_norm=max_grad_norm, **HYPER)
    losses = []
    for ids in BATCHES:
        loss = sharded(input_ids=ids, labels=ids).loss
        sharded.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("granularity", ["element", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("torch_kernels")
def test_full_density_equals_torch(dtype: torch.dtype, granularity: str, max_grad_norm: float | None) -> None:
    """25 steps with weight decay: to 1e-12 in float64, bit for bit in fp32."""
    ours, theirs = (CASES["element"].model().to(dtype) for _ in range(2))
    losses = train_masked(ours, granularity, max_grad_norm)
    expected = train_dense(theirs, max_grad_norm)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12, msg=name)
        else:
            assert torch.equal(mine, other), name
    assert losses == (pytest.approx(expected, rel=1e-13) if dtype == torch.float64 else expected)


def test_the_norm_is_that_of_torch() -> None:
    """``grad_norm`` is what clip_grad_norm_ reports, over all masked entries together."""
    model = shard(CASES["element"].model(), "single")
    optimizer = MaskedAdamW(model, full_mask(model, "tensor"), max_grad_norm=0.5)
    model.backward(model(input_ids=BATCHES[0], labels=BATCHES[0]).loss)
    plain = CASES["element"].model()
    plain(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(
        float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)), rel=1e-6
    )


def test_a_thousand_tiny_updates_move_a_bf16_weight() -> None:
    """1000 steps of about 1e-5 on a weight of 0.5 are lost in bf16 (its spacing there is 4e-3); the fp32 master keeps them."""
    plain = CASES["element"].model().bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        plain.get_parameter(name).fill_(0.5)
    stalled = torch.full((4,), 0.5, dtype=torch.bfloat16)
    model = shard(plain, "single")
    optimizer = MaskedAdamW(
        model, Mask.random(model, 0.5, "element", seed=0, maskable="up_proj"), lr=1e-5, betas=(0, 0)
    )
    grads = [support.grad for support in optimizer.supports]
    for _ in range(1000):
        for grad in grads:
            grad.fill_(-1.0)
        optimizer.step()
        stalled += 1e-5
    assert bool((stalled == 0.5).all())
    mask = optimizer.mask.dense(name)
    weight = plain.get_parameter(name)
    assert torch.equal(weight[mask], torch.tensor(0.51).bfloat16().expand(int(mask.sum())))
    assert bool((weight[~mask] == 0.5).all())


def entries(model: ShardedModel, mask: Mask) -> Tensor:
    return torch.cat(
        [model.module.get_parameter(name).detach().flatten()[mask.elements(name)] for name in mask]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "polynomial"])
def test_schedules_from_transformers(schedule: str) -> None:
    """The rates are torch's, and a rate of zero moves nothing."""
    model = shard(CASES["element"].model(), "single")
    mask = Mask.random(model, 0.3, "element", seed=0)
    optimizer = MaskedAdamW(model, mask, lr=1e-2)
    other = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    ours, theirs = (
        get_scheduler(schedule, o, num_warmup_steps=2, num_training_steps=6) for o in (optimizer, other)
    )
    for step in range(6):
        before = entries(model, mask)
        model.backward(model(input_ids=BATCHES[step], labels=BATCHES[step]).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(before, entries(model, mask)) == (ours.get_last_lr()[0] == 0)
        other.step()
        ours.step()
        theirs.step()
        assert ours.get_last_lr() == theirs.get_last_lr()
    assert optimizer.param_groups[0]["lr"] == ours.get_last_lr()[0]


def test_a_replaced_optimizer_refuses_to_step() -> None:
    model = shard(CASES["element"].model(), "single")
    first, second = (MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=seed)) for seed in (0, 1))
    model.backward(model(input_ids=BATCHES[0], labels=BATCHES[0]).loss)
    with pytest.raises(ValueError, match="another mask was attached"):
        first.step()
    second.step()
    assert second.grad_norm > 0
    model.detach()
    with pytest.raises(ValueError, match="another mask was attached"):
        second.step()


def test_step_takes_a_closure() -> None:
    model = shard(CASES["element"].model(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0))

    def closure() -> float:
        loss = model(input_ids=BATCHES[0], labels=BATCHES[0]).loss
        model.backward(loss)
        return loss.item()

    assert optimizer.step(closure) > 0
    assert optimizer.grad_norm > 0


def one_step(model: ShardedModel, optimizer: MaskedAdamW, ids: Tensor) -> None:
    model.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()


def test_state_dict_resumes_bit_for_bit() -> None:
    """On a model that holds the base again: masters and step counts are in the state."""
    model = shard(CASES["bf16"].model(), "single")
    mask = Mask.random(model, 0.3, "element", seed=0)
    optimizer = MaskedAdamW(model, mask, **HYPER)
    for ids in BATCHES[:5]:
        one_step(model, optimizer, ids)
    saved = copy.deepcopy(optimizer.state_dict())
    for ids in BATCHES[5:10]:
        one_step(model, optimizer, ids)

    fresh = shard(CASES["bf16"].model(), "single")
    resumed = MaskedAdamW(fresh, mask)
    resumed.load_state_dict(saved)
    for ids in BATCHES[5:10]:
        one_step(fresh, resumed, ids)
    for (_, my_state), (_, state) in zip(resumed.compact(), optimizer.compact(), strict=True):
        assert torch.equal(my_state["master"], state["master"])
        assert torch.equal(my_state["exp_avg_sq"], state["exp_avg_sq"])
        assert my_state["step"] == state["step"] == 10
    assert all(map(torch.equal, fresh.module.parameters(), model.module.parameters()))
    assert resumed.param_groups[0]["lr"] == HYPER["lr"]


def test_state_of_another_mask_or_partition_is_refused() -> None:
    model = shard(CASES["element"].model(), "single")
    one = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0))
    state = copy.deepcopy(one.state_dict())
    other = MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=1))
    with pytest.raises(ValueError, match="saved for another mask"):
        other.load_state_dict(state)
    one = MaskedAdamW(model, one.mask)
    # as many entries, but others
    elsewhere = {**state, "owned": [(first + 1, number) for first, number in state["owned"]]}
    shorter = copy.deepcopy(state)
    shorter["state"][0]["exp_avg"] = shorter["state"][0]["exp_avg"][:-1]
    for wrong in (elsewhere, shorter):
        with pytest.raises(ValueError, match="another rank or number of ranks"):
            one.load_state_dict(wrong)
    one.load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0: must not be negative"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): both must lie in \[0, 1\)"),
        ({"lr": math.inf}, "lr=inf: must be finite"),
        ({"eps": 0.0}, "eps=0.0: must be positive"),
        ({"eps": 1e-50}, "eps=1e-50: is too small for fp32; use at least 1e-37"),
        ({"eps": math.inf}, "eps=inf: must be finite"),
        ({"weight_decay": math.inf}, "weight_decay=inf: must be finite"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be positive; use None"),
    ],
)
def test_options_out_of_range(option: dict, message: str) -> None:
    model = shard(CASES["element"].model(), "single")
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(model, Mask.random(model, 0.3, "element", seed=0), **option)


def test_a_second_parameter_group_is_refused() -> None:
    """It would never be stepped."""
    model = shard(CASES["element"].model(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, seed=0))
    head = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="add_param_group: MaskedAdamW trains the entries of its mask alone"):
        optimizer.add_param_group({"params": head.parameters(), "lr": 1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("prepared", [False, True], ids=["itself", "accelerate"])
def test_torch_checkpoint_is_told_where_to_save(prepared: bool) -> None:
    """``accelerator.save_state`` under FSDP2 had ended in ``KeyError: 0``."""
    model = CASES["element"].model()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.1))
    asked = Accelerator(cpu=True).prepare_optimizer(optimizer) if prepared else optimizer
    AcceleratorState._reset_state(reset_partial_state=True)
    for ask in (get_optimizer_state_dict, get_state_dict):
        with pytest.raises(
            ValueError, match=r"states of whole parameters.* save with trace_dist\.checkpoint"
        ):
            ask(model, asked)
    assert asked.state_dict()["state"].keys() == dict(enumerate(optimizer.supports)).keys()


def test_deepspeed_is_not_given_it() -> None:
    """It would shard, clip and step the entries as a model's parameters. What it does first with any optimizer is refused."""
    model = shard(CASES["element"].model(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, seed=0))
    engine = SimpleNamespace(
        _supported_optims=lambda: [torch.optim.Optimizer], zero_use_cpu_optimizer=lambda: False
    )
    configure = load_deepspeed().runtime.engine.DeepSpeedEngine._configure_optimizer
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"param_groups: .* call deepspeed\.initialize without an optimizer"
        ):
            configure(engine, optimizer, None)
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5


def by_assignment(model: PreTrainedModel) -> None:
    model.load_state_dict(CASES["element"].model().state_dict(), assign=True)


def by_new_layer(model: PreTrainedModel) -> None:
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(old.in_features, old.out_features, bias=False)


@pytest.mark.parametrize(
    "change",
    [by_assignment, by_new_layer, lambda model: model.resize_token_embeddings(120)],
    ids=["assigned", "new layer", "resized"],
)
def test_parameters_that_were_replaced_are_refused(change: Callable[[PreTrainedModel], object]) -> None:
    """The optimizer would go on with tensors that the model no longer uses."""
    model = CASES["element"].model()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, seed=0, maskable="all"))
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    optimizer.step()
    change(model)
    with pytest.raises(
        ValueError, match=r"was replaced in the model since, as .*; build the optimizer after them"
    ):
        optimizer.step()
    assert MaskedAdamW(model, Mask.random(model, 0.3, seed=0, maskable="all")).step() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_is_refused(dtype: torch.dtype) -> None:
    """Its weights would lack the fp32 copy that was asked for."""
    model = CASES["element"].model()
    optimizer = MaskedAdamW(model, Mask.random(model, 0.3, seed=0))
    model.to(dtype)
    model(input_ids=BATCHES[0], labels=BATCHES[0]).loss.backward()
    with pytest.raises(ValueError, match=r"was cast from torch\.float32 to .* since; cast the model first"):
        optimizer.step()
    assert MaskedAdamW(model, Mask.random(model, 0.3, seed=0)).step() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_one_that_leaves_its_model_is_refused(copied: Callable[[MaskedAdamW], object]) -> None:
    """It would come back without its mask."""
    model = CASES["element"].model()
    with pytest.raises(ValueError, match=r"neither copied nor pickled; keep its state_dict\(\)"):
        copied(MaskedAdamW(model, Mask.random(model, 0.3, seed=0)))
