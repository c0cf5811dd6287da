"""What fits, and what is said when nothing does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist.config import Backend
from trace_dist.profiling import estimate as estimate_module
from trace_dist.profiling.bounds import ESTIMATE_ERROR
from trace_dist.profiling.estimate import Estimator, estimate
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.plan import GIB, plan


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> MemorySetup:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=4000, hidden_size=512, num_hidden_layers=2, num_attention_heads=8, intermediate_size=1024
    ).save_pretrained(folder)
    return MemorySetup(str(folder), backend="fsdp2", world_size=2, sequence_length=128)


def test_every_option_fits_and_offers_something_new(base: MemorySetup) -> None:
    options = plan(base, gpu_gib=0.055, reserve_gib=0.01)
    assert len(options) > 1
    assert [option.setup.density for option in options] == sorted(
        (o.setup.density for o in options), reverse=True
    )
    for position, option in enumerate(options):
        found = estimate(option.setup)
        assert option.gib == pytest.approx(found.peak / GIB + 0.01)
        assert option.headroom_gib == pytest.approx(0.055 - option.gib)
        assert option.headroom_gib >= 0
        assert option.host_gib == pytest.approx(sum(found.host.values()) / GIB)
        for above in options[:position]:
            slower = (
                above.setup.micro_batch_size < option.setup.micro_batch_size
                or above.setup.activation_checkpointing > option.setup.activation_checkpointing
                or (above.setup.offload == "cpu" and option.setup.offload == "none")
            )
            assert slower


def test_more_memory_and_more_gpus_never_offer_less(base: MemorySetup) -> None:
    def best(gib: float, gpus: int) -> tuple[float, bool]:
        setup = plan(
            MemorySetup(base.model, backend="fsdp2", world_size=gpus, sequence_length=128), gib, 0.0
        )[0].setup
        return setup.density, not setup.activation_checkpointing

    sizes = [best(gib, 2) for gib in (0.035, 0.06, 4.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == (0.2, True)
    counts = [sizes[0], *(best(0.035, gpus) for gpus in (4, 16))]
    assert counts == sorted(counts)


def test_layers_are_found_once_for_all_options(base: MemorySetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many layers: to look at all of them for each weight of each option would take minutes."""
    found = list[int]()
    linear_modules = estimate_module.linear_modules

    def counted(module: nn.Module) -> Any:
        found.append(1)
        return linear_modules(module)

    monkeypatch.setattr(estimate_module, "linear_modules", counted)
    estimator = Estimator(base.model, base.dtype)
    for density in (0.1, 0.2):
        estimator(replace(base, density=density))
    assert len(found) == 1


def test_nothing_fits_and_what_would(base: MemorySetup) -> None:
    with pytest.raises(ValueError, match=r"nothing fits: the leanest option .* use GPUs of 1 GiB") as error:
        plan(base, 0.026, 0.0)
    found = re.search(r", (\d+) GPUs of this size", str(error.value))
    assert found is not None
    assert plan(
        MemorySetup(base.model, backend="fsdp2", world_size=int(found[1]), sequence_length=128), 0.026, 0.0
    )
    with pytest.raises(ValueError, match=r"gpu_gib=1: must be more than reserve_gib=1"):
        plan(base, 1, 1)


def test_densities_at_which_nothing_is_selected_are_passed_by(base: MemorySetup) -> None:
    """Two layers have fourteen tensors: one in a hundred of their entries is none of them."""
    tensors = replace(base, granularity="tensor")
    assert plan(tensors, 4.0)[0].setup.density == 0.2
    with pytest.raises(ValueError, match=r"the leanest option \(density 0.05, "):
        plan(tensors, 0.002, 0.001)
    with pytest.raises(ValueError, match=r"granularity='tensor': at density 0\.2 and below"):
        plan(replace(tensors, maskable="embed"), 4.0)


def test_one_process_reads_all_weights_and_many_read_parts(base: MemorySetup) -> None:
    config = LlamaConfig.from_pretrained(base.model)
    module = LlamaForCausalLM(config)
    largest = config.vocab_size * config.hidden_size
    itemsize = getattr(torch, base.dtype).itemsize
    alone = plan(replace(base, backend="single", world_size=1), 4.0)[0]
    assert alone.loading_gib == itemsize * sum(each.numel() for each in module.parameters()) / GIB
    shared = plan(replace(base, world_size=3), 4.0)[0]
    assert shared.loading_gib == itemsize * -(-largest // 3) / GIB


@pytest.mark.parametrize(("backend", "ranks", "blocks"), [("zero3", 2, 2), ("fsdp2", 2, 0), ("single", 1, 0)])
def test_high_adds_the_measured_error_and_blocks_that_wait(
    base: MemorySetup, backend: Backend, ranks: int, blocks: int
) -> None:
    """And low leaves the reserve out."""
    estimator = Estimator(base.model, base.dtype)
    (block,) = {
        2 * sum(parameter.numel() for parameter in layer.parameters())
        for layer in estimator.module.model.layers
    }
    for option in plan(replace(base, backend=backend, world_size=ranks), 0.2, 0.01):
        peak = estimate(option.setup).peak
        assert option.low_gib == peak / GIB
        assert option.gib == pytest.approx(option.low_gib + 0.01)
        added = option.high_gib - option.gib
        assert added == pytest.approx((ESTIMATE_ERROR * peak + blocks * block) / GIB)
        assert added > 0


def test_an_option_that_fits_as_expected_may_not_at_its_high_bound(base: MemorySetup) -> None:
    expected = plan(base, 4.0, 0.0)[0].gib
    first = plan(base, expected, 0.0)[0]
    assert first.headroom_gib == 0
    assert first.high_gib > expected
