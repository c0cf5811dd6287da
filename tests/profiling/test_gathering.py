"""What a rank holds gathered during a step, for a chain of layers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine.rank_gathering import DISTANCES, KEPT
from transformers import AutoModelForCausalLM

from trace_dist import Mask, shard
from trace_dist.models import blocks
from trace_dist.profiling.activations import Moment, trace_step
from trace_dist.profiling.gathering import Zero3Limits, fsdp2_gathered, zero3_gathered
from trace_dist.sharding import zero3
from trace_dist.sharding.zero3 import zero3_config

LAYERS = ["a", "b", "c", "d"]
NUMEL = dict.fromkeys(LAYERS, 100)


def chain() -> list[Moment]:
    """The root module, then four layers forward and backward."""
    moments = [Moment("root", fetches=())]
    for phase, layers in (("forward", LAYERS), ("backward", LAYERS[::-1])):
        for name in layers:
            moments += [Moment(f"{phase} {name}", fetches=(name,)), Moment("after", releases=(name,))]
    return moments


def limits(**changes: int) -> Zero3Limits:
    return Zero3Limits(**{"persistence_threshold": 0, **changes})


def test_one_rank_gathers_nothing() -> None:
    assert set(zero3_gathered(chain(), NUMEL, 1)) == {0}


def test_a_small_model_is_whole_and_its_flat_buffer_lives_until_the_last_layer() -> None:
    gathered = zero3_gathered(chain(), NUMEL, 16, limits=limits())
    #                     root  a         b         c         d         backward: d, c, b, a and after each
    assert gathered == [400, 800, 800, 800, 800, 800, 800, 800, 400, 400, 300, 300, 200, 200, 100, 100, 0]


def test_without_prefetch_and_reuse_one_layer_is_there_at_a_time() -> None:
    gathered = zero3_gathered(chain(), NUMEL, 16, limits=limits(prefetch_bucket=0, max_reuse_distance=0))
    assert gathered == [0, *[100, 0] * 8]


def test_only_what_comes_again_soon_is_kept() -> None:
    gathered = zero3_gathered(chain(), NUMEL, 16, limits=limits(prefetch_bucket=0, max_reuse_distance=300))
    # c comes again after d, d: 200 elements; b after c, d, d, c: 400.
    assert gathered == [0, 100, 0, 100, 0, 100, 100, 200, 200, 200, 100, 100, 0, 100, 0, 100, 0]


def test_prefetching_stops_at_the_live_limit() -> None:
    wide = limits(prefetch_bucket=100, max_reuse_distance=0)
    # In backward d, what forward saw coming is kept: d itself, c, and b, which is fetched ahead now.
    assert max(zero3_gathered(chain(), NUMEL, 16, limits=wide)) == 300
    narrow = limits(prefetch_bucket=100, max_reuse_distance=0, max_live=100)
    assert max(zero3_gathered(chain(), NUMEL, 16, limits=narrow)) == 100


def test_blocks_come_again_when_the_backward_pass_of_the_model_begins() -> None:
    moments = [replace(moment, whole=bool(moment.fetches or moment.releases)) for moment in chain()]
    moments.insert(9, Moment("backward of the model", fetches=(), whole=True))
    gathered = zero3_gathered(moments, NUMEL, 16, limits=limits(prefetch_bucket=0, max_reuse_distance=300))
    # From the end of forward a is 300 elements away and is freed, b is 200 away and stays.
    forward, backward = gathered[:9], gathered[9:]
    assert forward == [0, 100, 0, 100, 100, 200, 200, 300, 300]
    assert backward == [300, 300, 200, 200, 100, 100, 0, 100, 0]


def test_what_is_used_on_both_sides_of_the_blocks_stays() -> None:
    """Such as a tied embedding: blocks do not count when DeepSpeed asks how far away its next use is."""
    embed = [Moment("forward embed", fetches=("a",)), Moment("after", releases=("a",))]
    block = [Moment("a block", fetches=("b",), whole=True), Moment("after", releases=("b",), whole=True)]
    turn = Moment("backward of the model", fetches=(), whole=True)
    moments = [*embed, *block, *embed, turn, *embed, *block]
    gathered = zero3_gathered(moments, NUMEL, 16, limits=limits(prefetch_bucket=0, max_reuse_distance=1))
    assert gathered == [100, 100, 200, 100, 100, 100, 100, 100, 0, 100, 0]


def test_on_a_gpu_a_whole_block_is_gathered_ahead() -> None:
    """Of four matrices, which are more elements than DeepSpeed gathers ahead by default."""

    def parts(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{name}{part}" for name in names for part in range(4))

    numel = dict.fromkeys(parts(tuple(LAYERS)), 20_000_000)
    moments = [
        Moment(
            moment.where, parts(moment.fetches or ()), parts(moment.releases), whole=moment.where != "root"
        )
        for moment in chain()
    ]
    assert zero3_gathered(moments, numel, 16)[0] == 80_000_000
    assert zero3_gathered(moments, numel, 2, by_messages=True)[0] == 60_000_000


def test_deepspeed_is_told_to_gather_a_whole_block_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        small, large = torch.nn.Linear(100, 100), torch.nn.Linear(10_000, 10_000, bias=False)

    def ahead(*blocks: torch.nn.Module) -> int:
        config = zero3_config(torch.bfloat16, blocks=blocks)
        return int(config["zero_optimization"]["stage3_prefetch_bucket_size"])

    assert ahead(small, large) == 50_000_000
    monkeypatch.setattr(zero3, "gathers_by_messages", lambda: False)
    assert ahead(small, large) == 100_000_000
    assert ahead(small) == ahead() == 50_000_000


@pytest.mark.parametrize(("ranks", "one_by_one"), [(8, True), (9, False)])
def test_deepspeed_is_told_to_gather_straight_to_its_place_among_few_ranks(
    monkeypatch: pytest.MonkeyPatch, ranks: int, one_by_one: bool
) -> None:
    monkeypatch.setattr(zero3.dist, "world_size", lambda: ranks)
    assert zero3_config(torch.bfloat16)["zero_optimization"]["stage3_allgather_sequential"]
    monkeypatch.setattr(zero3, "gathers_by_messages", lambda: False)
    config = zero3_config(torch.bfloat16)["zero_optimization"]
    assert config["stage3_allgather_sequential"] is one_by_one


def test_small_parameters_stay() -> None:
    assert set(zero3_gathered(chain(), NUMEL, 16, limits=limits(persistence_threshold=100))) == {400}


def test_what_is_gathered_one_by_one_needs_no_flat_buffer() -> None:
    gathered = zero3_gathered(chain(), NUMEL, 2, True, limits())
    assert gathered == zero3_gathered(chain(), NUMEL, 8, limits=limits())  # nor among the ranks of one node
    assert gathered == [*[400] * 10, 300, 300, 200, 200, 100, 100, 0]


def test_fsdp2_holds_the_root_this_block_and_the_next() -> None:
    groups = {"a": None, "b": 0, "c": 1, "d": None}
    gathered = fsdp2_gathered(chain(), NUMEL, groups)
    forward, backward = gathered[3:7], gathered[11:15]
    assert forward == [400, 400, 300, 300]  # c is followed by the root and itself
    assert backward == [400, 400, 300, 300]
    assert gathered[-1] == 200


@pytest.mark.launcher
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_deepspeed_keeps_what_is_foreseen_between_forward_and_backward(
    world, monkeypatch: pytest.MonkeyPatch, name: str, whole: bool
) -> None:
    monkeypatch.setattr(blocks, "WHOLE_BLOCK_ELEMENTS", 10**6 * whole)
    module = KEPT[name].model()
    masked = dict.fromkeys(Mask.random(shard(module, "single"), 0.3, "element"))
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(module.config)
    moments = trace_step(meta, masked, 2, 7).moments
    numel = {path: parameter.numel() for path, parameter in meta.named_parameters()}
    turn = next(i for i, moment in enumerate(moments) if moment.where == "backward of the model")
    foreseen = [
        zero3_gathered(moments, numel, 2, True, limits(prefetch_bucket=0, max_reuse_distance=distance))[
            turn - 1
        ]
        for distance in DISTANCES
    ]
    assert len(set(foreseen)) >= 4
    assert world(2).section("gathering")[f"{name}-{whole}"] == foreseen
