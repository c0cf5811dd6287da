"""MaskedAdamW on models that it did not shard: the caller's loop, the caller's preparation, the dense reference's losses."""

from __future__ import annotations

import functools

import pytest
import torch
from engine.cases import CASES
from engine.rank_prepared import CASE, ROWS, plain_loop
from engine.training import make_optimizer, train_reference

from trace_dist import Mask, MaskedAdamW
from trace_dist.sharding import ReplicatedModel
from trace_dist.sharding.prepared import as_sharded
from trace_dist.sharding.zero3 import idle_options

KINDS = ("plain", "ddp", "fully_shard", "accelerate", "engine")


@functools.cache
def expected(name: str) -> list[float]:
    return train_reference(CASES[name]).losses


@pytest.mark.launcher
@pytest.mark.parametrize("case", [CASE.name, ROWS.name])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_reference(world, kind: str, case: str) -> None:
    found = world(3).section("prepared")
    assert found[f"{kind}/{case}"] == pytest.approx(expected(case), rel=2e-6)


@pytest.mark.launcher
def test_clipping_that_deepspeed_would_do_is_said(world) -> None:
    assert world(3).section("prepared")["called"]["clipping"] == [
        "gradient_clipping=0.5 of the DeepSpeed config clips nothing: give max_grad_norm to MaskedAdamW"
    ]


def test_what_an_engine_without_an_optimizer_does_not_do_is_said() -> None:
    asked = {
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
        "scheduler": {"type": "WarmupLR"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }
    assert [line.partition(" of ")[0] for line in idle_options(asked)] == [
        "gradient_clipping=1.0",
        "fp16.enabled=True",
        "scheduler.type=WarmupLR",
        "zero_optimization.offload_optimizer.device=cpu",
    ]
    zero = {"stage": 3, "offload_optimizer": {"device": "none"}}
    assert not list(
        idle_options({"fp16": {"enabled": False}, "gradient_clipping": 0.0, "zero_optimization": zero})
    )


@pytest.mark.launcher
@pytest.mark.parametrize(
    "kind", ["ddp later", "static graph", "static graph later", "loss.backward on zero3"]
)
def test_wrapped_after_the_optimizer_and_without_model_backward(world, kind: str) -> None:
    assert world(3).section("prepared")[kind] == pytest.approx(expected(CASE.name), rel=2e-6)


@pytest.mark.launcher
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_optimizer_on_the_same_model_replaces_the_first(world, kind: str) -> None:
    """After an evaluation; embeddings, norms and biases, which hooks catch, are masked too."""
    found = world(3).section("prepared")
    assert found[f"{kind} again"] == pytest.approx(expected(CASE.name), rel=2e-6)
    assert "another mask was attached to the model since" in found[f"{kind} first"]


@pytest.mark.launcher
@pytest.mark.parametrize(
    "way",
    [
        *("loss.backward", "engine.backward"),
        *("accumulated by loss.backward", "accumulated by engine.backward"),
    ],
)
def test_an_engine_is_trained_by_calling_it(world, way: str) -> None:
    """DeepSpeed divides by the passes that its config accumulates, once."""
    assert world(3).section("prepared")["called"][way] == pytest.approx(expected(CASE.name)[:3], rel=2e-6)


@pytest.mark.launcher
def test_what_else_a_loop_asks_of_an_engine(world) -> None:
    for report in world(3).reports:
        found = report["prepared"]["called"]
        assert found["boundaries"] == [False, True, False, True]
        assert found["reset"]
        assert "call step() of the MaskedAdamW" in found["engine.step"]


@pytest.mark.launcher
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_loaded_later_are_trained_on(world, kind: str) -> None:
    """Neither training nor DDP, put around before, looks like loading; on no rank is what was loaded overwritten."""
    for report in world(3).reports:
        assert report["prepared"]["loaded"][kind] == {"taken": 0, "wrong": 0}


@pytest.mark.launcher
@pytest.mark.parametrize("kind", ["plain", "ddp"])
@pytest.mark.parametrize("case", [CASE.name, ROWS.name])
def test_replicated_ranks_share_the_states(world, kind: str, case: str) -> None:
    """Each rank holds a part of the compact tensors, all of them together, and no dense gradient."""
    found = [report["prepared"] for report in world(3).reports]
    shares = [report[f"{kind}/{case} share"] for report in found]
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 0.5
    assert not any(report[f"{kind}/{case} dense"] for report in found)


@pytest.mark.launcher
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "engine with an optimizer",
            "stage 3 with DeepSpeedZeroOptimizer_Stage3; masked training needs stage 3 without",
        ),
        ("engine of stage 1", "a DeepSpeed engine of ZeRO stage 1"),
        ("fsdp1", "wrapped by FSDP1, .*; use fully_shard"),
        ("data parallel", "wrapped by nn.DataParallel, .*; start one process for each GPU"),
        ("another seed", "model.norm.weight' differs between the ranks; load one checkpoint"),
        ("hybrid", "on a mesh of (1, 3); masked training needs dimension 0 cut over all 3 ranks"),
        (
            "cut for another group",
            "of 'model.embed_tokens.weight' here.*; masked training needs it cut over all 3",
        ),
        ("partly sharded", "'model.layers.0' is sharded by fully_shard but the whole is not"),
    ],
)
def test_what_is_refused(world, model: str, message: str) -> None:
    for report in world(3).reports:
        for part in message.split(".*"):
            assert part in report["prepared"]["refused"][model]


@pytest.mark.launcher
def test_ranks_that_would_run_out_of_batches_are_refused(world) -> None:
    for report in world(3).reports:
        found = report["prepared"]["join"]
        assert "let ranks run out of batches" in found["shadowed"]
        assert found["ended by the first"] == ""


def test_a_plain_model_in_one_process() -> None:
    model = CASE.model()
    assert plain_loop(CASE, model, make_optimizer(CASE, model)) == pytest.approx(
        expected(CASE.name), rel=2e-6
    )


def test_a_sharded_model_stays_what_it_is() -> None:
    sharded = ReplicatedModel(CASE.model())
    assert as_sharded(sharded) is sharded


def test_an_error_in_a_backward_pass_does_not_spoil_the_next() -> None:
    model, twin = CASE.model(), CASE.model()
    optimizer, reference = make_optimizer(CASE, model), make_optimizer(CASE, twin)
    ids = torch.arange(3, 12)[None]

    def explode(grad: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    out = model.model(input_ids=ids).last_hidden_state
    hidden = model.model.norm(out)
    hidden.register_hook(explode)
    with pytest.raises(RuntimeError, match="out of memory"):
        hidden.sum().backward()
    optimizer.zero_grad()
    for each, its in ((model, optimizer), (twin, reference)):
        each(input_ids=ids, labels=ids).loss.backward()
        its.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_an_embedding_with_sparse_gradients_is_trained_as_a_dense_one() -> None:
    grads = []
    for sparse in (False, True):
        model = CASE.model()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.get_input_embeddings().sparse = sparse
        optimizer = MaskedAdamW(model, Mask.random(model, 0.5, "row", seed=0, maskable="embed_tokens"))
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        grads += [support.grad for support in optimizer.supports]
    dense, found = grads
    assert found.any()
    torch.testing.assert_close(found, dense, rtol=0, atol=0)
