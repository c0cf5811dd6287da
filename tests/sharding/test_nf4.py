"""A 4-bit base trains as the dense model that holds the same values; its codes never change."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.rank_nf4 import NAMES, Dequantized, coded, codes, deltas, same
from engine.resuming import run
from engine.training import Outcome, train, train_reference

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import ShardedModel

BACKENDS = ("zero3", "fsdp2")


@functools.cache
def expected(name: str) -> Outcome:
    return train_reference(Dequantized.of(name))


def assert_close(name: str, losses: list[float], norms: list[float], state: dict[str, torch.Tensor]) -> None:
    reference = expected(name)
    assert losses == pytest.approx(reference.losses, rel=2e-6)
    assert norms == pytest.approx(reference.norms, rel=1e-5)
    assert state.keys() == reference.state.keys()
    for parameter, value in reference.state.items():
        torch.testing.assert_close(state[parameter], value, rtol=0, atol=2e-5, msg=parameter)
    start = Dequantized.of(name).model().state_dict()
    assert any(not torch.equal(state[parameter], start[parameter]) for parameter in state)


@pytest.mark.parametrize("name", NAMES)
def test_in_one_process(name: str) -> None:
    model = shard(coded(name), "single")
    before = codes(model)
    outcome = train(CASES[name], model)
    assert_close(name, outcome.losses, outcome.norms, outcome.state)
    assert before
    assert same(before, codes(model))


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_on_ranks(world, num_ranks: int, backend: str, name: str) -> None:
    found = world(num_ranks)
    report = found.section("nf4")[f"{backend}/{name}"]
    state = torch.load(found.folder / f"nf4-{backend}-{name}.pt")
    assert_close(name, report["losses"], report["norms"], state)
    for each in found.reports:
        assert each["nf4"][f"{backend}/{name}"]["codes"]
        assert each["nf4"][f"{backend}/{name}"]["num_codes"] > 0


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_overlays_are_gathered_by_block_and_ahead(world, num_ranks: int, backend: str) -> None:
    """One collective for each block; nobody waits for one but has begun the next. After a step they are gathered anew."""
    for report in world(num_ranks).reports:
        found = report["nf4"][f"{backend}/gathers"]
        assert " ".join(found["forward"]) == "begin 0 begin 1 wait 0 begin 2 wait 1 begin 3 wait 2 wait 3"
        # The last block is still there.
        assert " ".join(found["backward"]) == "begin 4 begin 5 wait 4 begin 6 wait 5 wait 6"
        assert found["after a step"][:3] == ["begin 7", "begin 8", "wait 7"]


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_while_loading(world, num_ranks: int, backend: str) -> None:
    """Each rank quantises the blocks that touch its shards; they are those of the whole model."""
    assert all(report["nf4"][f"{backend}/loaded"] for report in world(num_ranks).reports)


@pytest.mark.launcher
def test_a_checkpoint_of_two_ranks_continues_on_one(world) -> None:
    case = CASES["element"]
    relay = world(2).folder / "nf4-relay"
    continued = run(shard(coded("element"), "single"), case, relay)
    whole = run(shard(coded("element"), "single"), case, None)
    assert list(continued.losses) == list(range(1, 10))
    for step, loss in continued.losses.items():
        assert loss == pytest.approx(whole.losses[step], rel=2e-6)
    for name, value in whole.state.items():
        torch.testing.assert_close(continued.state[name], value, rtol=0, atol=2e-5, msg=name)


def test_deltas_in_one_process() -> None:
    assert all(deltas(shard(coded("element"), "single")).values())


@pytest.mark.launcher
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_deltas_on_ranks(world, num_ranks: int, backend: str) -> None:
    for report in world(num_ranks).reports:
        assert all(report["nf4"][f"{backend}/deltas"].values()), report["nf4"][f"{backend}/deltas"]


@pytest.mark.parametrize("options", [{"offload": "cpu"}, {"state_dtype": "8bit"}])
def test_with_memory_options(options: dict[str, str]) -> None:
    """Gradients, states and overlay fit together; offloading changes where the update runs, not what it is."""

    def trained(model: ShardedModel, **kept: str) -> dict[str, torch.Tensor]:
        optimizer = MaskedAdamW(model, CASES["row"].mask(model), lr=1e-2, **kept)  # type: ignore[arg-type]
        for step in range(3):
            ids = torch.arange(12).view(2, 6) + step
            model.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
        return model.full_state_dict()

    ours = trained(shard(coded("row"), "single"), **options)
    theirs = trained(shard(Dequantized.of("row").model(), "single"), **options)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5, msg=name)


def test_the_codes_count_among_the_weights() -> None:
    model = shard(coded("row"), "single")
    optimizer = MaskedAdamW(model, CASES["row"].mask(model))
    held = sum(tensor.nbytes for tensor in optimizer.model_states()["weights"])
    words = sum(code.nbytes for code in codes(model).values())
    dense = sum(parameter.nbytes for parameter in CASES["row"].model().parameters())
    overlays = 4 * sum(support.runs.num_entries for support in optimizer.supports)
    others = sum(p.nbytes for n, p in model.module.named_parameters() if not n.endswith(("packed", "absmax")))
    assert held == words + overlays + others
    assert held < dense


@pytest.mark.parametrize("quantise", [coded, lambda name: CASES[name].model()], ids=["nf4", "dense"])
def test_a_copy_of_a_model_with_a_mask_holds_what_was_trained(quantise: Callable[[str], Any]) -> None:
    """In memory or in a file; it goes its own way, and the sharded model itself is copied in neither."""
    model, inputs = shard(quantise("element"), "single"), torch.arange(8).view(1, 8)
    mask = Mask.random(model, 0.05, seed=0)
    optimizer = MaskedAdamW(model, mask, lr=1e-2)
    before = model(inputs).logits.detach()

    def step() -> None:
        model.backward(model(inputs, labels=inputs).loss)
        optimizer.step()

    step()
    trained = model(inputs).logits.detach()
    file = io.BytesIO()
    torch.save(model.module, file)
    file.seek(0)
    copies = [copy.deepcopy(model.module), torch.load(file, weights_only=False)]
    step()
    assert not torch.equal(trained, before)
    for each in copies:
        assert torch.equal(each(inputs).logits, trained)
    for attempt in (lambda: torch.save(model, io.BytesIO()), lambda: copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"^copy: a sharded model cannot be"):
            attempt()
