"""What stands between steps, on a GPU that is not there (engine/fake_gpu.py): no CPU tensor meets one of the device."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import CASES
from engine.fake_gpu import GPU, OnGpu, Streams, fake_gpu, place
from torch import Tensor

from trace_dist import Delta, Mask, MaskedAdamW, quantize_nf4
from trace_dist.bank.delta import Snapshot, applied, extract_delta
from trace_dist.checkpoint import load_checkpoint, load_dense, save_checkpoint, save_dense
from trace_dist.config import Quantize
from trace_dist.optim import part_server
from trace_dist.optim.masked_adamw import _host_values
from trace_dist.optim.part_server import Clock, PartServer, Source
from trace_dist.optim.parts import owned

CASE = CASES["bf16"]
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32 weights": {},
    "master": {},
    "no master": {"master": False},
    "8bit": {"state_dtype": "8bit"},
    "offloaded": {"offload": "cpu"},
    "offloaded 8bit": {"offload": "cpu", "state_dtype": "8bit", "master": False},
}
SAVED = ("fp32 weights", "master", "no master", "8bit", "offloaded")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, torch_kernels: None) -> Iterator[Streams]:
    """The CPU takes the same path of the kernels, so that both have the same bits."""
    with fake_gpu(monkeypatch) as streams:
        yield streams


def make(option: str, device: str, quantize: Quantize = "none") -> MaskedAdamW:
    case = CASES["element"] if option == "fp32 weights" else CASE
    module = case.model()
    module = quantize_nf4(module) if quantize == "nf4" else module
    module = place(module, device)
    mask = Mask.random(
        case.model(), 0.3, "element", seed=0, maskable="linear" if quantize == "nf4" else "all"
    )
    return MaskedAdamW(module, mask, lr=1e-2, **OPTIONS[option])


def step(optimizer: MaskedAdamW, seed: int = 0) -> None:
    for number, support in enumerate(optimizer.supports):
        generator = torch.Generator().manual_seed(100 * seed + number)
        support.grad.copy_(torch.randn(len(support.grad), generator=generator))
    optimizer.step()


def values(optimizer: MaskedAdamW) -> list[Tensor]:
    """Weights and states, on the CPU."""
    states = [state[key] for _, state in optimizer.compact() for key in sorted(state) if key != "step"]
    return [tensor.detach().cpu() for tensor in (*optimizer.model.module.parameters(), *states)]


def assert_same(one: MaskedAdamW, other: MaskedAdamW) -> None:
    assert all(map(torch.equal, values(one), values(other)))


def by_checkpoint(optimizer: MaskedAdamW, folder: Path) -> Callable[[MaskedAdamW], object]:
    saved = save_checkpoint(folder, 1, optimizer, {})
    return lambda other: load_checkpoint(saved, other)


def by_state_dict(optimizer: MaskedAdamW, folder: Path) -> Callable[[MaskedAdamW], object]:
    """As accelerate and Trainer load it: on the CPU."""
    state = optimizer.state_dict()
    host = {
        **state,
        "state": {
            i: {k: v.cpu() if isinstance(v, Tensor) else v for k, v in s.items()}
            for i, s in state["state"].items()
        },
        "values": [value.cpu() for value in state["values"]],
    }
    return lambda other: other.load_state_dict(host)


def by_values(optimizer: MaskedAdamW, folder: Path) -> Callable[[MaskedAdamW], object]:
    """From the host, into a twin of the same states."""
    kept = [optimizer.values(support).cpu() for support in optimizer.supports]

    def restore(other: MaskedAdamW) -> None:
        step(other)
        other.set_values([value + 1 for value in kept])
        other.set_values(kept)

    return restore


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("way", [by_checkpoint, by_state_dict, by_values])
def test_a_resume_onto_a_device(gpu: Streams, tmp_path: Path, option: str, way: Any) -> None:
    """It continues as a run on the CPU does, bit for bit."""
    reference, saved = make(option, "cpu"), make(option, "cuda")
    assert saved.model.device == GPU
    step(reference)
    step(saved)
    resumed = make(option, "cuda")
    way(saved, tmp_path)(resumed)
    assert_same(resumed, reference)
    assert all(isinstance(p, OnGpu) for p in resumed.model.module.parameters())
    for optimizer in (reference, resumed):
        step(optimizer, seed=1)
    assert_same(resumed, reference)


@pytest.mark.parametrize("saved", SAVED[1:])
@pytest.mark.parametrize("loaded", SAVED[1:])
def test_a_checkpoint_of_other_states_loads_onto_a_device(
    gpu: Streams, tmp_path: Path, saved: str, loaded: str
) -> None:
    """And one that the CPU wrote."""
    written = make(saved, "cpu")
    step(written)
    folder = save_checkpoint(tmp_path, 1, written, {})
    pair = [make(loaded, device) for device in ("cpu", "cuda")]
    for optimizer in pair:
        load_checkpoint(folder, optimizer)
        step(optimizer, seed=1)
    assert_same(*pair)


def test_dense_training_resumes_onto_a_device(gpu: Streams, tmp_path: Path) -> None:
    def start(device: str) -> tuple[list[tuple[str, Any]], torch.optim.Optimizer]:
        module = place(CASES["element"].model(), device)
        named = [(name, parameter.requires_grad_(True)) for name, parameter in module.named_parameters()]
        return named, torch.optim.AdamW([p for _, p in named], lr=1e-2, foreach=False)

    def train(named: list[tuple[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    host, device = start("cpu"), start("cuda")
    train(*host)
    load_dense(save_dense(tmp_path, 1, *host, {}), *device)
    train(*host)
    train(*device)
    assert all(torch.equal(p, q.cpu()) for (_, p), (_, q) in zip(host[0], device[0], strict=True))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_deltas_and_snapshots_on_a_device(gpu: Streams, tmp_path: Path, quantize: Quantize) -> None:
    def tour(device: str) -> list[Tensor]:
        optimizer = make("master", device, quantize)
        model, mask = optimizer.model, optimizer.mask
        snapshot = Snapshot(model, mask)
        step(optimizer)
        delta = extract_delta(model, mask, "task")
        snapshot.restore()
        delta.save(tmp_path / f"{device}.safetensors")
        loaded = Delta.load(tmp_path / f"{device}.safetensors")
        with applied(model, loaded):
            inside = extract_delta(model, mask, "task")
        after = extract_delta(model, mask, "task")
        assert all(torch.equal(loaded.values[name], value) for name, value in inside.values.items())
        assert any(not torch.equal(loaded.values[name], value) for name, value in after.values.items())
        return [*inside.values.values(), *after.values.values()]

    assert all(map(torch.equal, tour("cpu"), tour("cuda")))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_part_is_handed_out_on_the_host_after_the_last_step(gpu: Streams, option: str) -> None:
    """On a stream of its own, which waits for that step alone."""
    optimizer = make(option, "cuda")
    step(optimizer)
    source = Source([], optimizer.compact(), partial(_host_values, optimizer.model, optimizer._offload))
    clock = Clock(GPU)
    clock.tick()
    gpu.log.clear()
    with clock.after_last_step():
        parts = [source.tensors(index) for index in range(len(optimizer.supports))]
    assert gpu.log[0].endswith("waits for an event of current")
    assert gpu.log[1].startswith("in side")
    for (support, state), part in zip(optimizer.compact(), parts, strict=True):
        assert not any(isinstance(tensor, OnGpu) for tensor in part.values())
        found = part["values"] if "values" in part else part["master"]
        assert torch.equal(found, optimizer.values(support).cpu())
        assert torch.equal(part["exp_avg"], state["exp_avg"].cpu())


def test_an_offloaded_step_waits_for_the_gradients(gpu: Streams) -> None:
    """They come down on a stream that waits for backward; the host waits for each before it uses it."""
    optimizer = make("offloaded", "cuda")
    gpu.log.clear()
    step(optimizer)
    assert gpu.log[0] == "side 1 waits for current"
    assert gpu.log.count("the host waits for side 1") == len(optimizer.supports)


def test_the_fake_refuses_what_a_gpu_refuses(gpu: Streams) -> None:
    host, device = torch.ones(3), torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        device + host
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([host, device])
    with pytest.raises(RuntimeError, match="same device"):
        host[device.long()]
    with pytest.raises(TypeError, match="numpy"):
        device.numpy()
    device.copy_(host)
    device[torch.tensor([0])] = 2.0
    assert device.cpu().tolist() == [2.0, 1.0, 1.0]
    assert (device + host.to(device)).device == GPU


@pytest.mark.parametrize("option", ["fp32 weights", "master", "no master"])
def test_states_are_read_beside_gathers_that_are_under_way(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread hands them out, or rank 0 alone reads them. With NF4 weights both waited for a gather that waited for rank 0."""
    optimizer = make(option, "cpu", "nf4")
    step(optimizer)
    freed: list[None] = []
    monkeypatch.setattr(optimizer.model._overlays, "forget", lambda: freed.append(None))
    found = optimizer.state_dict()["values"]
    for support, expected in zip(optimizer.supports, found, strict=True):
        assert torch.equal(
            _host_values(optimizer.model, None, support), expected.to(optimizer.model.like(support.name))
        )
    assert not freed
    optimizer.load_state_dict(optimizer.state_dict())
    assert freed


def server_of(optimizer: MaskedAdamW) -> PartServer:
    source = Source(
        owned(optimizer.supports), optimizer.compact(), partial(_host_values, optimizer.model, None)
    )
    return PartServer(optimizer, source, torch.device("cpu"), linger=False)


def test_one_that_says_nothing_keeps_nobody_from_a_part() -> None:
    """As what looks for open ports does: rank 0 then waited for ever."""
    optimizer = make("master", "cpu")
    step(optimizer)
    server = server_of(optimizer)
    assert server._address is not None
    with ThreadPoolExecutor(1) as other, socket.create_connection(server._address):
        asked = other.submit(server.ask, 0)
        done = wait([asked], timeout=20).done
    assert done
    assert all(map(torch.equal, asked.result()["values"], map(optimizer.values, optimizer.supports)))


@pytest.mark.parametrize(
    ("taken", "why"), [(True, "has said nothing for 0.5 s"), (False, "timed out")], ids=["taken", "dropped"]
)
def test_a_rank_that_says_nothing_is_given_up(taken: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a host whose packets are dropped: rank 0 then waited for ever."""
    monkeypatch.setattr(part_server, "QUIET_SECONDS", 0.5)
    server = server_of(make("master", "cpu"))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as mute, ExitStack() as others:
        # What comes to a listener whose queue is full is dropped.
        for _ in range(0 if taken else 4):
            waiting = others.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(mute.getsockname())
        server._everyone = [(mute.getsockname(), b"key")]
        with (
            ThreadPoolExecutor(1) as other,
            pytest.raises(ValueError, match=rf"rank 0 .*{why}.*; save with trace_dist\.checkpoint"),
        ):
            other.submit(server.ask, 0).result(timeout=20)


def test_a_part_is_handed_out_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(part_server, "_own_host", lambda: "::1")
    optimizer = make("master", "cpu")
    step(optimizer)
    part = server_of(optimizer).ask(0)
    assert all(map(torch.equal, part["values"], map(optimizer.values, optimizer.supports)))


def test_a_rank_that_is_in_its_step_for_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_server, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(part_server, "SIGN_SECONDS", 0.1)
    optimizer = make("master", "cpu")
    step(optimizer)
    late, asking = server_of(optimizer), server_of(optimizer)
    asking._everyone = late._everyone
    asking.clock.tick()
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(asking.ask, 0)
        assert not wait([asked], timeout=1.5).done
        late.clock.tick()
        part = asked.result(timeout=20)
    assert all(map(torch.equal, part["values"], map(optimizer.values, optimizer.supports)))
