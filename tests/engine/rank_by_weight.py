"""Models that use ``.weight`` of a linear layer: gradients on every backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM, MambaConfig, MambaForCausalLM

from trace_dist import Mask, MaskedAdamW, quantize_nf4
from trace_dist.sharding.fsdp2 import Fsdp2Model
from trace_dist.sharding.zero3 import Zero3Model
from trace_dist.utils import dist

WIDTH = 8
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


class ByWeight(nn.Module):
    """``first``, which is called; ``used``, of which only the weight is used; ``both``; and ``last``, called after all."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.used, self.both = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        h = F.one_hot(input_ids % WIDTH, WIDTH).to(self.last.weight.dtype)
        h = torch.tanh(self.first(h))
        h = torch.tanh(F.linear(h, self.used.weight)) + self.both(h)
        return SimpleNamespace(logits=self.last(h @ self.both.weight))


def mamba() -> nn.Module:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SIZES, state_size=4))


def jamba() -> nn.Module:
    torch.manual_seed(0)
    experts = {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    state = {"mamba_dt_rank": 4, "mamba_d_state": 4}
    return JambaForCausalLM(JambaConfig(**SIZES, **heads, **experts, **state))


MODELS: dict[str, Callable[[], nn.Module]] = {"toy": ByWeight, "mamba": mamba, "jamba": jamba}
MASKABLE = {"toy": "weight", "mamba": "linear", "jamba": "linear"}


def ids_of(rank: int) -> Tensor:
    return torch.arange(3 + rank, 11 + rank)[None]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.square().mean()


def dense_gradients(model: nn.Module, num_ranks: int) -> dict[str, Tensor]:
    """The mean over ranks of the whole gradients."""
    for rank in range(num_ranks):
        (loss_of(model, ids_of(rank)) / num_ranks).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_weight(out: Path) -> dict[str, Any]:
    """This rank's compact gradients, and where they begin in those of all ranks."""
    backends: dict[str, Callable[[nn.Module], Any]] = {
        "zero3": lambda module: Zero3Model(module, 0),
        "fsdp2": Fsdp2Model,
        "plain": lambda module: module,
        "zero3 nf4": lambda module: Zero3Model(quantize_nf4(module), 0),
        "fsdp2 nf4": lambda module: Fsdp2Model(quantize_nf4(module)),
    }
    found: dict[str, Any] = {}
    for backend, prepare in backends.items():
        for name, make in MODELS.items():
            model = prepare(make())
            mask = Mask.random(model, 0.5, seed=1, maskable=MASKABLE[name])
            optimizer = MaskedAdamW(model, mask)
            optimizer.model.backward(loss_of(optimizer.model, ids_of(dist.rank())))
            found[f"{backend}/{name}"] = {s.name: [s.offset, s.grad.tolist()] for s in optimizer.supports}
            optimizer.model.detach()
    return found
