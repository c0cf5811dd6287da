"""The time of a recorded step, worked out by hand; GPUs by name and by file; the bytes of our kernels beside their indices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor
from trace_kernels.runs import Runs
from trace_kernels.traffic import moved_bytes

from trace_dist.profiling.simulation.events import COMPUTE, HOSTS, Event, Program
from trace_dist.profiling.simulation.gpus import Gpu, gpu_names, load_gpu, sources
from trace_dist.profiling.simulation.kernels import touched_bytes
from trace_dist.profiling.simulation.rank import simulated_rank
from trace_dist.profiling.simulation.recorder import Recorder
from trace_dist.profiling.simulation.replay import MESSAGE_US, Cluster, collective_seconds, replay, sent_where
from trace_dist.profiling.simulation.setup import SimulationSetup
from trace_dist.profiling.simulation.streams import Streams
from trace_dist.profiling.stand_ins import grouped_flops

# 1e12 operations, 1e9 bytes and 1e9 bytes to a neighbour take a second; nothing else takes time.
GPU = Gpu("toy", 1, 1, 0.5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0)
NODE = Cluster(GPU, 1, 4, 8)


def program(*events: Event, world: int = 4) -> Program:
    numbered = [event._replace(number=number) for number, event in enumerate(events)]
    return Program(numbered, world, 0, 0, {}, 1, 1)


def kernel(seconds: float, stream: str = COMPUTE, **what: Any) -> Event:
    return Event("kernel", stream, "matmul", flops=int(seconds * 1e12), **what)


def collective(seconds: float, name: str = "_allgather_base_", lane: str = "gather") -> Event:
    return Event("collective", COMPUTE, name, num_bytes=seconds * 1e9, lane=lane)


def joins(after: int) -> Event:
    return Event("joins", COMPUTE, after=after)


def test_what_is_not_waited_for_overlaps() -> None:
    beside = program(Event("mark", COMPUTE, "forward"), collective(3), kernel(2), joins(1), kernel(1))
    timing = replay(beside, NODE)
    assert timing.step == 4
    assert timing.spent == {"matmul": 3, "waiting for gathers": 1, "waiting for the host": 0}
    assert timing.phases == {"forward": 4}
    assert replay(beside, replace(NODE, overlaps=False)).step == 6


def test_links_are_shared_and_a_group_keeps_its_order() -> None:
    both = program(collective(3), collective(2, "alltoall_base_", "exchange"), joins(1), joins(0))
    assert replay(both, NODE).step == 5
    assert replay(both, NODE).spent["waiting for exchanges"] == 5


def test_a_group_of_neighbours_stays_in_its_node() -> None:
    """Bytes and steps are those of the group, whatever the number of ranks."""
    event = collective(3, "alltoall_base_", "rows of 2")._replace(ranks=2)
    assert replay(program(event, joins(0)), NODE).spent["waiting for heads and slices"] == 3
    two_nodes = replace(NODE, nodes=2)
    assert sent_where(two_nodes, event) == {"node": 3e9, "network": 0.0}
    across = sent_where(two_nodes, event._replace(ranks=8))
    assert across == pytest.approx({"node": 3e9 * 3 / 7, "network": 3e9 * 4 / 7})


def test_kernels_of_side_streams_take_the_compute_streams_time() -> None:
    assert replay(program(kernel(1), kernel(2, "side 1"), kernel(1)), NODE).step == 4
    assert replay(program(kernel(2, "side 1"), joins(0), kernel(1)), NODE).step == 5  # waits, and then pays


def test_the_host_gives_work_and_waits() -> None:
    slow = replace(NODE, gpu=replace(GPU, host_us=1e6, hook_us=2e6))
    assert replay(program(kernel(0.5), Event("hook", COMPUTE), kernel(0.5)), slow).step == 4.5
    waits = program(kernel(3), Event("host_waits", COMPUTE, target=COMPUTE), kernel(1))
    assert replay(waits, slow).step == 4 + 1 + 1
    agree = program(Event("collective", COMPUTE, "allreduce_", lane=HOSTS))
    assert replay(agree, NODE).step == pytest.approx(4 * MESSAGE_US / 1e6)


def test_a_kernel_takes_the_longest_of_its_three_times() -> None:
    assert replay(program(kernel(1)._replace(num_bytes=2e9)), NODE).step == 2
    assert replay(program(kernel(1)._replace(wide=True)), NODE).step == 2  # fp32
    assert replay(program(kernel(0)), replace(NODE, gpu=replace(GPU, kernel_us=1e6))).step == 1


def test_copies_cross_the_bus_and_the_host_works_in_its_own_memory() -> None:
    crosses = Event("kernel", COMPUTE, "bus", num_bytes=2e9)
    waits, works = Event("host_waits", COMPUTE, target=COMPUTE), Event("host_works", COMPUTE, num_bytes=3e9)
    assert replay(program(crosses, waits, works, kernel(1)), NODE).step == 2 + 3 + 1


def test_collectives_within_and_between_nodes() -> None:
    two = replace(NODE, nodes=2, link_gbps=4)  # half a gigabyte per second
    ring, direct = collective(8), collective(7, "alltoall_base_")
    # A ring crosses once for each of the node's four GPUs; directly, 4 of 7 other ranks are elsewhere.
    assert sent_where(two, ring) == {"node": 6e9, "network": 2e9}
    assert sent_where(two, direct) == {"node": 3e9, "network": 4e9}
    assert collective_seconds(two, ring) == 8  # inside the node, 4 between
    assert collective_seconds(two, direct) == 8  # between nodes, 3 inside
    latent = replace(two, gpu=replace(GPU, node_us=1e6, network_us=10e6, collective_us=0.5e6))
    assert collective_seconds(latent, collective(0)) == 0.5 + 6 + 10  # of 7 steps one crosses
    assert collective_seconds(replace(latent, trees=True), collective(0)) == 0.5 + 2 + 10
    assert collective_seconds(latent, collective(0, "allreduce_")) == 0.5 + 2 * 16


def test_bounds_lie_around_what_is_expected() -> None:
    step = program(collective(3), kernel(2), joins(0), kernel(1))
    scaled = replace(NODE, gpu=replace(GPU, matmul_share=0.5, link_share=0.5))
    low, expected, high = (replay(step, each).step for each in scaled.bounds().values())
    assert low < expected < high


@pytest.mark.parametrize("nodes", [1, 4, 128])
@pytest.mark.parametrize(
    "name", ["alltoall_base_", "_allgather_base_", "allreduce_", "_reduce_scatter_base_"]
)
def test_bounds_lie_around_every_collective(name: str, nodes: int) -> None:
    cluster = Cluster(load_gpu("h100"), nodes, 8, 400)
    for num_bytes in (0, 1e5, 1e8):
        event = collective(num_bytes / 1e9, name)
        low, expected, high = (collective_seconds(each, event) for each in cluster.bounds().values())
        assert low <= expected <= high


def test_a_program_of_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="recorded for 2 ranks"):
        replay(program(world=2), NODE)


@pytest.mark.parametrize("name", gpu_names())
def test_every_number_of_a_gpu_has_a_source(name: str) -> None:
    gpu = load_gpu(name)
    assert 0 < gpu.matmul_share <= 1
    for key, (value, source) in sources(name).items():
        assert getattr(gpu, key) == value > 0
        assert len(source) > 8, key


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    text = "name: mine\nmemory_gib: 32\nmatmul_tflops: 200\nvector_tflops: {value: 50, source: its page}\n"
    file.write_text(text + "memory_gbps: 1000\nnode_gbps: 30\n")
    own = load_gpu(str(file))
    assert (own.name, own.memory_gib, own.vector_tflops) == ("mine", 32, 50)
    assert own.host_us == load_gpu("h100").host_us


BOMB = "k0: &k0 [a, b]\n" + "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\n", "memory_gib, matmul_tflops, .*: missing"),
        ("name: mine\nspeed: 3\n", "'speed' is unknown; use attention_share"),
        ("name: mine\nmemory_gib: fast\n", "memory_gib='fast': must be a positive number"),
        ("name: mine\nmatmul_share: 2\n", "matmul_share=2: is a share"),
        ("- 3", "must be keys and values"),
        ("a: b: c", "cannot be read as YAML"),
        ("name: 2026-99-99", "cannot be read as YAML"),
        (f"name: mine\nmemory_gib: 1{400 * '0'}\n", "memory_gib=10.*: must be a positive number"),
        (BOMB, "once its aliases are written out"),
    ],
)
def test_a_file_that_makes_no_sense(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_gpu(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "nodes=0: must be at least 1"),
        ({"nodes": 1000}, "more than 4096 ranks"),
        ({"density": 2.0}, r"density=2.0: must lie in \(0, 1\]"),
        ({"price": -1.0}, "price=-1.0: must be a positive number"),
    ],
)
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationSetup("model", **options)
    with pytest.raises(ValueError, match="gpu='h200': unknown; use one of 4090, a100, h100"):
        load_gpu("h200")


@pytest.mark.parametrize("block", [1, 4, 16, 64, 576])
def test_touched_bytes_are_those_of_real_indices(block: int) -> None:
    runs = (
        Runs.random(1 << 18, block, 0.05) if (1 << 18) % block == 0 else Runs.random(block * 400, block, 0.05)
    )
    _, least = moved_bytes("compact_gather", runs, torch.bfloat16)
    touched = touched_bytes(runs.numel, 2, runs.num_entries, block)
    assert touched + 4 * runs.num_entries + runs.units.nbytes == pytest.approx(least, rel=0.03)


def test_work_and_memory_are_counted() -> None:
    recorder = Recorder()
    with recorder:
        left = torch.empty(64, 32, device="meta", dtype=torch.bfloat16)
        product = left @ torch.empty(32, 16, device="meta", dtype=torch.bfloat16)
        assert recorder.alive == 2 * (64 * 32 + 64 * 16)  # the other factor is gone
        assert recorder.peak == recorder.alive + 2 * 32 * 16
        assert recorder.events[-1].flops == 2 * 64 * 32 * 16
        recorder.clear()
        product = product + 1
        assert recorder.peak == recorder.alive + product.nbytes
        picked = left[:, torch.tensor([3, 9])]
        seen: float = product.sum().item()
    add, gather, sums, wait = recorder.events
    assert seen == 1
    assert add.num_bytes == 2 * product.nbytes
    assert gather.num_bytes < left.nbytes + picked.nbytes + 16
    assert (sums.kind, wait.kind) == ("kernel", "host_waits")
    with recorder, pytest.raises(RuntimeError, match="asks for values"):
        left.nonzero()


def test_products_of_experts_are_counted_forward_and_backward() -> None:
    """As many operations as the same products one by one, in any dtype and size."""
    recorder = Recorder()
    with recorder:
        rows = torch.empty(10, 6, device="meta", requires_grad=True)
        experts = torch.empty(3, 6, 5, device="meta", requires_grad=True)
        ends = torch.tensor([2, 7, 10], dtype=torch.int32).to("meta")
        torch.nn.functional.grouped_mm(rows, experts, offs=ends).sum().backward()
    products = [event.flops for event in recorder.events if event.name == "matmul"]
    assert products == 3 * [2 * 10 * 6 * 5]
    assert (rows.grad is not None, experts.grad is not None) == (True, True)
    batched = torch.empty(3, 4, 6, device="meta")
    assert grouped_flops(batched, experts) == 2 * 3 * 4 * 6 * 5


def test_a_model_that_asks_for_values_has_those_that_are_known() -> None:
    """While it runs: an optimizer on a rank without values asks for none."""
    recorder = Recorder()
    with recorder:
        recorder.mark("forward")
        chosen = torch.empty(6, 4, device="meta").topk(2).indices
        theirs = (chosen == 3).nonzero()
        taken = torch.empty(6, device="meta")[(chosen == 3).any(-1)]
        counts = chosen.flatten().bincount(minlength=4).tolist()
        assert (counts, len(theirs), len(taken)) == ([3, 3, 3, 3], 3, 3)
        assert recorder.events[-1].kind == "host_waits"
        recorder.mark("optimizer")
        with pytest.raises(RuntimeError, match="asks for values"):
            (chosen == 3).nonzero()


def test_copies_from_and_to_the_host_are_told_apart() -> None:
    recorder = Recorder()
    with recorder:
        down = torch.empty(8, device="meta").to("cpu")
        down.to("meta")
        down.clone()
    assert [(event.kind, event.name, event.num_bytes) for event in recorder.events] == [
        ("kernel", "bus", 32),
        ("host_waits", "", 0),
        ("kernel", "bus", 32),
    ]


@pytest.mark.parametrize("on_cpus", [True, False])
def test_on_cpus_gloo_copies_what_it_gathers(on_cpus: bool) -> None:
    with simulated_rank(2, synchronous=on_cpus) as recorder:
        part, whole = torch.empty(8, device="meta"), torch.empty(16, device="meta")
        recorder.clear()
        td.all_gather_into_tensor(whole, part)
        td.all_reduce(whole)
        kept = part.nbytes + whole.nbytes
        assert recorder.alive == kept
        assert recorder.peak == kept + on_cpus * whole.nbytes
        td.reduce_scatter_tensor(part, torch.empty(16, device="meta"))
        assert recorder.peak == kept + (1 + on_cpus) * whole.nbytes
        # The copy is kept as long as nobody has waited for the collective.
        ongoing = td.all_gather_into_tensor(whole, part, async_op=True)
        assert recorder.alive == kept + on_cpus * whole.nbytes
        for _ in range(2):
            ongoing.wait()
            assert recorder.alive == kept


def test_a_storage_that_was_emptied_is_counted_as_empty() -> None:
    recorder = Recorder()
    with recorder:
        gathered = torch.empty(8, device="meta")
        for size in (0, 32, 0):
            gathered.untyped_storage().resize_(size)
            recorder.resized(gathered)
            assert recorder.alive == size
        other = torch.empty(2, device="meta")
    assert recorder.peak == 32
    del gathered
    assert recorder.alive == other.nbytes


def test_streams_tell_who_waits_for_whom() -> None:
    recorder = Recorder()
    streams = Streams(recorder)
    side = streams.make()

    def work() -> Tensor:
        return torch.empty(2, device="meta") + 1

    with recorder:
        work()
        side.wait_stream(streams.current())
        with streams.on(side):
            work()
            event = streams.event()
            event.record()
        streams.current().wait_stream(side)
        event.synchronize()
        assert not event.query()
    kinds = [(event.kind, event.stream, event.after) for event in recorder.events]
    assert kinds == [
        ("kernel", COMPUTE, -1),
        ("joins", "side 1", 0),
        ("kernel", "side 1", -1),
        ("joins", COMPUTE, 2),
        ("host_waits", COMPUTE, 2),
    ]
