"""How layer and pooling are chosen."""

from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trace_dist.config import BankConfig
from trace_dist.continual.judge import Judge
from trace_dist.continual.layer import choose_view


def stream(name: str, num: int = 200) -> Any:
    prompts = [f"{name} {number}" for number in range(num)]
    return SimpleNamespace(task=SimpleNamespace(name=name, train={"prompt": prompts}))


@pytest.mark.parametrize("num_prompts", [12, 30, 400])
def test_the_layer_is_not_chosen_by_the_prompts_of_the_limits(
    num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of many layers and poolings on the prompts that a limit counts has too few errors there by chance."""
    looked_at: list[torch.Tensor] = []

    def represent(judge: Judge, model: Any, prompts: list[str], layers: Any, poolings: Any) -> Any:
        """Another vector for each prompt."""
        seeds = [int(sha256(prompt.encode()).hexdigest()[:8], 16) for prompt in prompts]
        x = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        looked_at.append(x)
        return dict.fromkeys(poolings, x[:, None].expand(-1, len(layers), -1))

    monkeypatch.setattr(Judge, "represent_views", represent)
    tasks, general = [stream("one"), stream("two")], [stream("three"), stream("four", 40)]
    bank = BankConfig(num_prompts=num_prompts, layer="auto", pooling="auto")
    modality = SimpleNamespace(poolings=("mean", "last"))
    bench: Any = SimpleNamespace(tasks=tasks, general=general, modality=modality)
    cfg: Any = SimpleNamespace(bank=bank, seed=0)
    judge = Judge(cfg, bench)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=4))
    model: Any = SimpleNamespace(module=SimpleNamespace(config=config))
    assert choose_view(judge, model) == (0, "mean")
    assert [len(x) >= 8 for x in looked_at] == [True] * 4
    chosen_by = torch.cat(looked_at)
    for group in ([tasks[0]], [tasks[1]], general):
        signature = judge.signature(model, group, "any", 0)
        assert torch.cdist(signature.heldout, chosen_by).min() > 1e-3
