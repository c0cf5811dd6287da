"""The masked linear layer inside real models: gradients, autocast, copies, and what detaching puts back."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from engine.cases import CASES, batches
from engine.toy import WIDTH, Toy
from torch import nn

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.sharding import ShardedModel, masked_linear, support
from trace_dist.sharding.masked_linear import Part, patch_linear, single_entries

IDS = batches(CASES["element"])[0][0]


def attach(
    granularity: str = "element", model: nn.Module | None = None, **kwargs
) -> tuple[ShardedModel, Mask]:
    sharded = shard(CASES["element"].model() if model is None else model, "single")
    mask = Mask.random(sharded, 0.5, granularity, seed=0, **kwargs)
    sharded.attach(mask)
    return sharded, mask


def compact_gradients(model: ShardedModel) -> dict[str, torch.Tensor]:
    assert model._compactor is not None
    return {support.name: support.grad for support in model._compactor.supports}


@pytest.mark.parametrize("granularity", ["element", "row", "column", "head"])
@pytest.mark.parametrize("maskable", ["linear", "all", r"layers\.1.*(up|norm)"])
def test_compact_gradient_is_the_dense_one_at_the_mask(granularity: str, maskable: str) -> None:
    model, mask = attach(granularity, maskable=maskable)
    plain = CASES["element"].model()
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for _ in range(2):  # gradients add up
        model.backward(model(input_ids=IDS, labels=IDS).loss)
    for name, grad in compact_gradients(model).items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(grad, 2 * dense.flatten()[mask.elements(name)], rtol=1e-5, atol=1e-8)
        assert model.module.get_parameter(name).grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_few_entries_are_computed_one_by_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the dense product, to the same gradients; also in pieces."""
    monkeypatch.setattr(masked_linear, "GATHERED", 3 * IDS.numel())
    found, computed = {}, list[int]()

    def count(grad: torch.Tensor, x: torch.Tensor, part: masked_linear.Part) -> torch.Tensor:
        computed.append(1)
        return single_entries(grad, x, part)

    monkeypatch.setattr(masked_linear, "single_entries", count)
    for limit in (0.0, 0.6):
        monkeypatch.setattr(support, "SINGLE", limit)
        model, _ = attach(model=CASES["element"].model().to(dtype))
        model.backward(model(input_ids=IDS, labels=IDS).loss)
        found[limit] = compact_gradients(model)
        assert bool(computed) == (limit > 0)
    for name, grad in found[0.6].items():
        scale = float(found[0.0][name].abs().max())
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(grad, found[0.0][name], rtol=1e-5, atol=tolerance * scale)


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_only_masked_rows_or_columns_are_computed(monkeypatch: pytest.MonkeyPatch, granularity: str) -> None:
    """With a mask of rows (columns) no gradient has more of them than the mask."""
    model, mask = attach(granularity)
    shapes = []
    original = torch.Tensor.__matmul__

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = original(a, b)
        shapes.append(tuple(product.shape))
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    model.backward(model(input_ids=IDS, labels=IDS).loss)
    gradients = {shape for shape in shapes if len(shape) == 2}
    axis = 0 if granularity == "row" else 1
    wanted = set()
    for name, units in mask.units.items():
        shape = list(mask.layouts[name].shape)
        shape[axis] = len(units)
        wanted.add(tuple(shape))
    assert gradients == wanted


@pytest.mark.parametrize("part", [Part(rows=torch.tensor([1, 4])), Part(columns=torch.tensor([0, 3, 5]))])
def test_spare_rows_and_columns_are_computed_and_cut_off(part: Part) -> None:
    """On a GPU the sides of products are multiples of 8 ([Note: aligned]); what is delivered is what was asked for."""
    delivered = []
    for each in (part, part.aligned(8)):
        layer = nn.Linear(6, 5, bias=False)
        layer.weight = nn.Parameter(torch.arange(30.0).view(5, 6), requires_grad=False)
        patch_linear(layer, torch.zeros((), requires_grad=True), each, delivered.append)
        layer(torch.arange(18.0).view(3, 6)).square().sum().backward()
    plain, aligned = delivered
    assert torch.equal(plain, aligned)
    lines = part.aligned(8).rows if part.columns is None else part.aligned(8).columns
    assert lines is not None
    assert len(lines) == 8
    assert part.aligned(1).spare == 0


def test_of_the_input_only_masked_columns_are_kept_for_backward() -> None:
    kept: dict[str, list[int]] = {}
    for granularity in ("element", "column"):
        model, mask = attach(granularity, Toy(), maskable="last.weight")
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, out=saved: out.append(t.numel()) or t, lambda t: t
        ):
            loss = model(torch.randn(3, WIDTH)).sum()
        model.backward(loss)
        kept[granularity] = saved
    columns = len(mask.units["last.weight"])
    assert kept == {"element": [3 * WIDTH], "column": [3 * columns]}
    assert 0 < columns < WIDTH


def test_frozen_inputs_and_keyword_inputs() -> None:
    """The lowest masked layer gets its gradient although its input needs none; a layer called by keyword works."""

    class Keyword(Toy):
        def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
            return self.last(input=torch.tanh(self.first(input=x)))

    model, _ = attach(model=Keyword(), maskable="first|last")
    x = torch.randn(2, WIDTH)
    model.backward(model(x).square().mean())
    assert all(bool(grad.any()) for grad in compact_gradients(model).values())


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_autocast(granularity: str) -> None:
    """Mixed precision on the CPU: the gradients of a plain model under autocast."""
    model, mask = attach(granularity)
    plain = CASES["element"].model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
        expected = plain(input_ids=IDS, labels=IDS).loss
    assert loss.item() == expected.item()
    model.backward(loss)
    expected.backward()
    for name, grad in compact_gradients(model).items():
        dense = plain.get_parameter(name).grad
        assert dense is not None
        torch.testing.assert_close(grad, dense.flatten()[mask.elements(name)], rtol=0.02, atol=1e-3)


def test_a_deep_copy_runs_on_its_own_weights() -> None:
    model, _ = attach()
    twin = copy.deepcopy(model.module)
    before = twin(input_ids=IDS).logits
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(2)
    assert torch.equal(twin(input_ids=IDS).logits, before)


def test_a_backward_pass_through_a_deep_copy_leaves_the_model_alone() -> None:
    """A frozen teacher, say, through which a loss is computed with gradients enabled."""

    def through(copied: nn.Module) -> None:
        embedded = copied.get_input_embeddings()(IDS).detach().requires_grad_()  # type: ignore[operator]
        copied(inputs_embeds=embedded).logits.square().mean().backward()
        assert embedded.grad is not None

    model, mask = attach()
    twin = copy.deepcopy(model.module)
    through(twin)
    assert not any(bool(grad.any()) for grad in compact_gradients(model).values())
    optimizer = MaskedAdamW(twin, mask)
    model.backward(model(input_ids=IDS, labels=IDS).loss)
    through(copy.deepcopy(twin))
    assert not any(bool(support.grad.any()) for support in optimizer.supports)
    assert all(bool(grad.any()) for grad in compact_gradients(model).values())


def test_a_deep_copy_of_a_sharded_model_is_refused() -> None:
    """Its hooks and buffers would be those of the original."""
    model, _ = attach()
    with pytest.raises(
        ValueError, match="copy: a sharded model cannot be copied; shard a copy of the plain model"
    ):
        copy.deepcopy(model)


def test_a_gradient_that_is_only_asked_for_is_not_accumulated() -> None:
    """As of torch's own parameters: ``torch.autograd.grad`` and ``backward(inputs=...)`` fill what they are asked for, alone."""
    model, _ = attach(maskable="all")
    embedded = model.module.model.embed_tokens(IDS).detach().requires_grad_()

    def loss() -> torch.Tensor:
        return model(inputs_embeds=embedded, labels=IDS).loss

    (asked,) = torch.autograd.grad(loss(), embedded)
    loss().backward(inputs=[embedded])
    assert embedded.grad is not None
    torch.testing.assert_close(embedded.grad, asked)
    assert not any(bool(grad.any()) for grad in compact_gradients(model).values())
    assert not any(support.reached for support in model._compactor.supports)
    loss().backward()
    assert bool(compact_gradients(model)["model.layers.0.mlp.up_proj.weight"].any())


def test_an_unknown_reduction_is_refused() -> None:
    model, _ = attach()
    with pytest.raises(ValueError, match="reduction='average': unknown; use 'mean' or 'sum'"):
        model.backward(model(input_ids=IDS, labels=IDS).loss, reduction="average")  # type: ignore[arg-type]


def test_detach_restores_the_model() -> None:
    model, _ = attach(maskable="all")
    patched = [name for name, module in model.module.named_modules() if "forward" in vars(module)]
    assert "model.layers.0.mlp.up_proj" in patched
    assert model.module.model.norm.weight.requires_grad
    model.detach()
    assert not any("forward" in vars(module) for module in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.module.parameters())
    with pytest.raises(ValueError, match="no mask is attached"):
        model.backward(torch.zeros((), requires_grad=True))


def test_detach_gives_back_a_forward_that_another_library_has_set() -> None:
    module = CASES["element"].model()
    layer = module.model.layers[0].mlp.up_proj
    layer.forward = theirs = functools.partial(type(layer).forward, layer)
    model, _ = attach(model=module)
    assert layer.forward is not theirs
    model.detach()
    assert layer.forward is theirs


def test_a_parameter_that_no_forward_uses_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = shard(Toy(), "single")
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, "element", seed=0, maskable="weight"))
    for _ in range(2):
        model.backward(model(torch.randn(2, WIDTH), skip=True).square().mean())
        optimizer.step()
    (message,) = caplog.messages
    assert "no gradient reached 1 of 4 masked parameters" in message
    assert "optional.weight" in message


class InPlace(nn.Module):
    """Adds to what its layers give, in place, as RoC-BERT's embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(7, 5), nn.Linear(5, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += x[..., :5]
        h = self.last(torch.tanh(h))
        h *= 2
        return h


@pytest.mark.parametrize("granularity", ["element", "row", "column"])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 7)])
def test_what_a_layer_gives_may_be_changed_in_place(shape: tuple[int, ...], granularity: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model, dense = InPlace(), InPlace()
    mask = Mask.random(model, 0.5, granularity, seed=1, maskable="weight")
    optimizer = MaskedAdamW(model, mask)
    for each in (model, dense):
        each(x).square().sum().backward()
    assert {each.name for each in optimizer.supports} == {"first.weight", "last.weight"}
    for each in optimizer.supports:
        expected = dense.get_parameter(each.name).grad.flatten()[mask.elements(each.name)]
        torch.testing.assert_close(each.grad, expected, rtol=1e-4, atol=1e-6)
