"""Predictions from a config alone against the tensors of real runs of the same model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import FAMILIES
from profiling.test_families import FAMILIES as OTHERS
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist import Mask, MaskedAdamW, quantize_nf4, shard
from trace_dist.checkpoint import Background, save_checkpoint
from trace_dist.masks.units import UnitLayout
from trace_dist.profiling import activations
from trace_dist.profiling.activations import trace_step
from trace_dist.profiling.estimate import Estimator, estimate
from trace_dist.profiling.exchange import Exchange
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.selection import Selection, decoded_bytes
from trace_dist.profiling.states import tensor_bytes
from trace_dist.sharding.reduction import BUCKET_BYTES
from trace_dist.train import cross_entropy
from trace_dist.train.loss import forward_nll_sum

BATCH, LENGTH = 3, 11


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **(FAMILIES | OTHERS)[family])


@pytest.fixture
def llama(tmp_path: Path) -> str:
    config_of("llama").save_pretrained(tmp_path)
    return str(tmp_path)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"granularity": "block", "block": 12, "density": 0.3},
    {"granularity": "row", "density": 0.2},
    {"granularity": "column", "density": 0.2},
    {"granularity": "head", "density": 0.5},
    {"maskable": "all", "density": 0.1},
    {"density": 1.0, "dtype": "float32"},
    {"state_dtype": "bfloat16", "master": False},
    {"state_dtype": "8bit", "density": 0.4},
    {"offload": "cpu"},
    {"offload": "cpu", "state_dtype": "8bit", "granularity": "row"},
    {"quantize": "nf4"},
    {"quantize": "nf4", "granularity": "row", "maskable": "all", "dtype": "float32"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_are_those_of_a_real_run(options: dict[str, Any], llama: str) -> None:
    setup = MemorySetup(llama, backend="single", device="cpu", checkpoint_async=False, **options)
    module = AutoModelForCausalLM.from_config(config_of("llama"), dtype=getattr(torch, setup.dtype))
    model = shard(quantize_nf4(module) if setup.quantize == "nf4" else module, "single")
    mask = Mask.random(model, setup.density, setup.granularity, 0, setup.block, setup.maskable)
    optimizer = MaskedAdamW(
        model, mask, state_dtype=setup.state_dtype, master=setup.master, offload=setup.offload
    )
    real = {name: tensor_bytes(tensors) for name, tensors in optimizer.model_states().items()}
    predicted = estimate(setup)
    # Chance: how many short units are drawn, where 12 does not divide 51; how many gaps between entries are wide.
    if setup.granularity == "block" or setup.quantize == "nf4":
        assert predicted.states == pytest.approx(real, rel=0.02)
    else:
        assert predicted.states == real
        assert predicted.num_entries == mask.num_entries


def saved_bytes(module: Any, masked: float, granularity: str) -> int:
    """Bytes that autograd keeps between forward and backward, from its own hooks."""
    model = shard(module.train(), "single")
    _ = MaskedAdamW(model, Mask.random(model, masked, granularity))
    own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # alive, so that no address is used twice
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(module.config.vocab_size, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_nll_sum(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "gpt2", "jetmoe", "dbrx"])
def test_activations_are_what_autograd_saves(family: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    module = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    model = shard(module, "single")
    masked = dict.fromkeys(Mask.random(model, 1.0))
    traced = trace_step(meta, masked, BATCH, LENGTH)
    assert traced.saved == pytest.approx(saved_bytes(module, 1.0, "element"), rel=0.02)


def test_activations_of_a_4bit_model_are_what_autograd_saves() -> None:
    with torch.device("meta"):
        meta = quantize_nf4(AutoModelForCausalLM.from_config(config_of("llama")))
    module = quantize_nf4(AutoModelForCausalLM.from_config(config_of("llama")))
    traced = trace_step(meta, dict.fromkeys(Mask.random(shard(module, "single"), 1.0)), BATCH, LENGTH)
    assert traced.saved == pytest.approx(saved_bytes(module, 1.0, "element"), rel=0.02)
    weight = module.get_submodule("model.layers.0.mlp.gate_proj").weight
    gate = next(m for m in traced.moments if m.where == "forward of model.layers.0.mlp.gate_proj")
    before = traced.moments[traced.moments.index(gate) - 1].peak
    assert gate.peak is not None
    assert before is not None
    # made anew, for this layer alone
    assert gate.peak["activations"] >= before["activations"] + weight.nbytes


def test_the_loss_upcasts_as_many_logits_as_on_the_device(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU upcasts a few rows of logits at a time, a GPU all of these."""
    vocabulary, upcast, rows = config_of("llama").vocab_size, 4, BATCH * (LENGTH - 1)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", upcast * vocabulary)
    setup = MemorySetup(llama, micro_batch_size=BATCH, sequence_length=LENGTH, backend="single")
    on_gpu, on_cpu = (estimate(replace(setup, device=name)).transient["logits"] for name in ("cuda", "cpu"))
    assert on_gpu - on_cpu == pytest.approx(4 * (rows - upcast) * vocabulary, rel=0.1)
    assert "meta" not in cross_entropy.CHUNK_ELEMENTS


def test_a_large_batch_is_no_longer_work(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks of logits there are, two are looked at, and the peak is that of all."""
    looked_at = list[slice]()
    chunks = cross_entropy.chunks

    def counted(num_rows: int, size: int) -> Iterator[slice]:
        for rows in chunks(num_rows, size):
            looked_at.append(rows)
            yield rows

    monkeypatch.setattr(cross_entropy, "chunks", counted)
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 3 * config_of("llama").vocab_size)
    setup = MemorySetup(llama, micro_batch_size=BATCH, sequence_length=LENGTH, backend="single")
    setup = replace(setup, device="cpu")
    found = estimate(setup)
    assert len(looked_at) == 2
    monkeypatch.setattr(activations, "CHUNKS", None)
    assert estimate(setup) == found
    assert len(looked_at) > 4


def test_recomputation_and_few_columns_keep_less(llama: str) -> None:
    setup = MemorySetup(llama, micro_batch_size=BATCH, sequence_length=50, backend="single")
    whole = estimate(setup)
    recomputed = estimate(replace(setup, activation_checkpointing=True))
    assert recomputed.transient["activations"] < 0.7 * whole.transient["activations"]
    assert recomputed.states == whole.states
    columns = estimate(replace(setup, granularity="column"))
    assert columns.transient["activations"] < whole.transient["activations"]


def test_whole_rows_need_no_dense_gradient(llama: str) -> None:
    setup = MemorySetup(llama, density=0.1, backend="single", sequence_length=50)
    dense, rows = estimate(setup), estimate(replace(setup, granularity="row"))
    assert dense.transient["weight_gradient"] == 2 * 51 * 36
    assert rows.transient["weight_gradient"] < 0.15 * dense.transient["weight_gradient"]


def test_the_peak_is_made_of_its_parts_and_ranks_share_states(llama: str) -> None:
    estimator = Estimator(llama, "bfloat16")
    alone = estimator(MemorySetup(llama, world_size=1, device="cpu"))
    shared = estimator(MemorySetup(llama, world_size=4, device="cpu"))
    assert alone.peak == sum(alone.peak_parts.values())
    assert alone.transient["gathered"] == 0
    for name in ("weights", "master", "exp_avg", "gradients"):
        assert shared.states[name] == pytest.approx(alone.states[name] / 4, rel=0.01)
    # Four bytes for an entry of one's own, one for each of the parameter's.
    assert shared.states["indices"] == pytest.approx(alone.states["indices"] / 4 * (1 + 4 / 4), rel=0.02)


def test_ranks_that_share_rows_keep_slices_of_activations(llama: str) -> None:
    """Those of rows that are as many times shorter; the model has three heads."""
    setup = MemorySetup(llama, world_size=3, micro_batch_size=2, sequence_length=32)
    shared, short = replace(setup, sequence_parallel=3), replace(setup, sequence_length=11)
    assert estimate(shared) == estimate(short)
    assert estimate(shared).between["activations"] < 0.4 * estimate(setup).between["activations"]
    with pytest.raises(ValueError, match="sequence_parallel=2: must divide the 3 ranks of the job"):
        estimate(replace(setup, sequence_parallel=2))
    with pytest.raises(ValueError, match="sequence_parallel=2: must divide the model's 3 attention heads"):
        estimate(replace(setup, world_size=4, sequence_parallel=2))


def test_offloaded_states_leave_the_device_only_where_there_is_one(llama: str) -> None:
    setup = MemorySetup(llama, offload="cpu")
    gpu, cpu = estimate(setup), estimate(replace(setup, device="cpu"))
    assert gpu.states["exp_avg"] == 0 < gpu.host["exp_avg"] == cpu.states["exp_avg"]
    assert sum(cpu.host.values()) == 0
    # Pinned: each parameter's two buffers are rounded up to a power of two.
    assert cpu.states["staging"] < gpu.host["staging"] < 2 * cpu.states["staging"]


def test_shared_indices_shrink_with_the_ranks(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = Estimator(llama, "bfloat16")
    few, many = (estimator(MemorySetup(llama, world_size=ranks)) for ranks in (8, 64))
    monkeypatch.setattr("trace_dist.profiling.estimate.worth_sharing", lambda *_: True)
    shared, further = (estimator(MemorySetup(llama, world_size=ranks)) for ranks in (8, 64))
    assert many.states["indices"] > few.states["indices"] / 2 > further.states["indices"]
    whole = few.states["indices"] - estimator(MemorySetup(llama, device="cpu")).states["indices"] / 8
    assert few.states["indices"] - shared.states["indices"] == pytest.approx(whole * 7 / 8, rel=0.05)
    # What is gathered of them lies there while gradients are delivered.
    assert shared.transient["reduction"] > few.transient["reduction"]


def test_the_best_values_are_kept_in_host_memory(llama: str) -> None:
    setup = MemorySetup(llama, world_size=2)
    plain, kept = estimate(setup), estimate(replace(setup, keep_best=True))
    assert kept.states == plain.states
    assert kept.host["best"] == plain.states["master"]
    assert estimate(replace(setup, keep_best=True, device="cpu")).states["best"] == plain.states["master"]
    halves = estimate(replace(setup, keep_best=True, master=False))
    assert halves.host["best"] == plain.states["master"] / 2


def test_a_checkpoint_is_written_from_a_copy_in_host_memory(llama: str, tmp_path: Path) -> None:
    """As large as a real one: values and moments, and the best values; pinned where it comes from an accelerator."""
    setup = MemorySetup(llama, backend="single")
    on_cpu = replace(setup, device="cpu")
    plain, best = estimate(on_cpu), estimate(replace(on_cpu, keep_best=True))
    module = AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.bfloat16)
    model = shard(module, "single")
    optimizer = MaskedAdamW(model, Mask.random(model, setup.density, setup.granularity))
    values_of = {support.name: optimizer.values(support) for support, _ in optimizer.compact()}
    background, kept = Background(), {}
    for name, values in (("plain", None), ("best", values_of)):
        save_checkpoint(tmp_path / name, 1, optimizer, {}, best=values, write=background.save)
        background.finish()
        kept[name] = tensor_bytes(background._buffers.values())
    background.close()
    assert plain.states["checkpoint"] == pytest.approx(kept["plain"], rel=0.001)
    assert best.states["checkpoint"] == pytest.approx(kept["best"], rel=0.001)
    assert "checkpoint" not in estimate(replace(on_cpu, checkpoint_async=False)).states
    pinned, pageable = estimate(setup).host, estimate(replace(setup, offload="cpu")).host
    assert plain.states["checkpoint"] == pageable["checkpoint"] < pinned["checkpoint"]
    assert pinned["checkpoint"] < 2 * plain.states["checkpoint"]


def test_where_a_kernel_decodes_indices_nothing_else_holds_them(llama: str) -> None:
    setup = MemorySetup(llama, world_size=2)
    gpu, cpu = estimate(setup), estimate(replace(setup, device="cpu"))
    block, block_cpu = (
        estimate(replace(setup, granularity="block", device=device)) for device in ("cuda", "cpu")
    )
    layout, chosen = UnitLayout((8, 100), 1), Selection(40, 40)
    assert decoded_bytes(layout, chosen, replace(setup, device="cpu")) == 4 * 40
    assert decoded_bytes(layout, chosen, setup) == 0
    assert gpu.states["indices"] > cpu.states["indices"]  # where the kernel's chunks begin
    assert block.states["indices"] == block_cpu.states["indices"]


def test_exchange_holds_what_waits_and_what_is_under_way() -> None:
    half = BUCKET_BYTES // 8
    sizes = [("a", 9 * half, half, 0, 0), ("b", 9 * half, half, 5 * half, 0), ("c", half, half, 0, 0)]
    exchange = Exchange(sizes, 2, world_size=2)
    assert exchange.deliver("c") == (2 * half, 8 * half)  # rows: the masked part itself, converted to fp32
    assert exchange.held == 4 * half
    size = 8 * half
    # and what is sent and received; indices are gone by then
    assert exchange.deliver("b") == (18 * half, size + 2 * size)
    assert exchange.held == 2 * size  # until the next bucket is full
    assert exchange.deliver("a")[1] == 4 * half + 2 * size
    assert exchange.held == 2 * 4 * half
    alone = Exchange([("a", 9 * half, half, 0, 0)], 2, world_size=1)
    assert alone.deliver("a") == (18 * half, 0)
    gathering = Exchange([("a", 9 * half, half, 0, 7)], 2, world_size=2)
    assert gathering.deliver("a")[1] == 3 * 4 * half + 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density=0.0: must lie in \(0, 1\]"),
        ({"density": 1e-9}, "not one unit is selected; raise it"),
        ({"micro_batch_size": 0}, "micro_batch_size=0: must be at least 1"),
        ({"backend": "single", "world_size": 2}, "use backend zero3 or fsdp2"),
        ({"maskable": "nothing"}, "matches no parameter"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str, llama: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(MemorySetup(llama, **options))


def test_a_model_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file or folder; give a config\.json"):
        estimate(MemorySetup(str(tmp_path / "absent")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no readable config"):
        estimate(MemorySetup(str(tmp_path / "config.json")))
