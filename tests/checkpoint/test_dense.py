"""Checkpoints of ordinary training: a run that was cut equals one that was not, bit for bit; what is not theirs is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.cases import CASES, batches
from engine.resuming import dropout_model
from torch import nn

from trace_dist.checkpoint import latest_checkpoint, load_checkpoint, load_dense, save_checkpoint, save_dense
from trace_dist.optim import MaskedAdamW

CASE = CASES["gpt2-conv1d"]
IDS = batches(CASE)[0][0]
Run = tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]


def make(kind: str, **options: object) -> Run:
    """A GPT-2 with dropout; LoRA's adapters alone, or everything, in two groups of other decay."""
    module: nn.Module = dropout_model().train()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        module = get_peft_model(module, LoraConfig(r=2, lora_dropout=0.1, target_modules=["c_attn"]))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True, **options)  # type: ignore[arg-type]
    return module, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def step(run: Run, count: int) -> list[float]:
    module, optimizer, schedule = run
    losses = []
    for _ in range(count):
        loss = module(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def trained(run: Run) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in run[0].named_parameters() if p.requires_grad]


def save(root: Path, number: int, run: Run) -> Path:
    return save_dense(root, number, trained(run), run[1], {"schedule": run[2].state_dict()})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    whole = make(kind)
    step(whole, 3)
    folder = save(tmp_path, 3, whole)
    losses = step(whole, 3)

    torch.manual_seed(2)
    resumed = make(kind)
    if kind == "lora":  # whose other half is drawn
        resumed[0].load_state_dict(make_same_base(whole, resumed))
    manifest = load_dense(folder, trained(resumed), resumed[1])
    resumed[2].load_state_dict(manifest["state"]["schedule"])
    assert manifest["step"] == 3
    assert step(resumed, 3) == losses
    for (name, one), (_, other) in zip(trained(whole), trained(resumed), strict=True):
        assert torch.equal(one, other), name
        mine, theirs = whole[1].state[one], resumed[1].state[other]
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def make_same_base(one: Run, other: Run) -> dict[str, torch.Tensor]:
    """The frozen weights of one, the adapters of the other."""
    adapters = dict(trained(other))
    return {name: adapters.get(name, value) for name, value in one[0].state_dict().items()}


def test_before_the_first_step(tmp_path: Path) -> None:
    """No moments exist yet."""
    torch.manual_seed(1)
    whole, other = make("full"), make("full")
    load_dense(save(tmp_path, 0, whole), trained(other), other[1])
    torch.manual_seed(3)
    losses = step(whole, 2)
    torch.manual_seed(3)
    assert step(other, 2) == losses


def test_names_that_share_a_weight(tmp_path: Path) -> None:
    """As a module lists them that ties its head to the embedding."""
    run, other = make("full"), make("full")
    step(run, 1)
    for each in (run, other):
        each[0].double_name = each[0].get_parameter("transformer.wte.weight")  # type: ignore[assignment]

    def twice(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return list(module.named_parameters(remove_duplicate=False))

    assert len(twice(run[0])) > len(trained(run))
    load_dense(save_dense(tmp_path, 1, twice(run[0]), run[1], {}), twice(other[0]), other[1])
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(trained(run), trained(other), strict=True))


def test_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    run = make("full")
    folders = [save(tmp_path, number, run) for number in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == folders[1:]
    (folders[2] / "rank-00000.safetensors").write_bytes(b"")
    assert latest_checkpoint(tmp_path) == folders[1]
    with pytest.raises(ValueError, match=r"rank-00000.safetensors: missing or damaged"):
        load_dense(folders[2], trained(run), run[1])


@pytest.mark.parametrize("part", ["values", "exp_avg"])
def test_what_is_not_finite_replaces_nothing(tmp_path: Path, part: str) -> None:
    run = make("full")
    step(run, 1)
    folder = save(tmp_path, 1, run)
    name, parameter = trained(run)[3]
    with torch.no_grad():
        (parameter if part == "values" else run[1].state[parameter][part]).view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"{part} of {name} is not finite, and nothing was written"):
        save(tmp_path, 2, run)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    full, lora = make("full"), make("lora")
    folder = save(tmp_path, 1, full)
    before = [p.detach().clone() for p in full[0].parameters()]
    with pytest.raises(
        ValueError, match=r"of other parameters \('.*' is .*in the checkpoint\); give the model"
    ):
        load_dense(folder, trained(lora), lora[1])
    one_group = torch.optim.AdamW(full[0].parameters())
    with pytest.raises(ValueError, match="other parameter groups"):
        load_dense(folder, trained(full), one_group)
    name, _ = trained(full)[0]
    with pytest.raises(ValueError, match=r"is torch.float32 .* there, torch.float32 \(7,\) here"):
        load_dense(folder, [(name, nn.Parameter(torch.zeros(7))), *trained(full)[1:]], full[1])
    with pytest.raises(ValueError, match="a parameter that is not among them"):
        save_dense(tmp_path, 2, trained(full)[1:], full[1], {})
    with pytest.raises(ValueError, match="state: cannot be kept as JSON"):
        save_dense(tmp_path, 2, trained(full), full[1], {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == [folder]
    assert all(map(torch.equal, full[0].parameters(), before))


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    run = make("full")
    folder = save(tmp_path / "dense", 1, run)
    module = CASE.model()
    masked = MaskedAdamW(module, CASE.mask(module))
    with pytest.raises(ValueError, match="a checkpoint of dense training, not of masked"):
        load_checkpoint(folder, masked)
    with pytest.raises(ValueError, match="a checkpoint of masked training, not of dense"):
        load_dense(save_checkpoint(tmp_path / "masked", 1, masked, {}), trained(run), run[1])
