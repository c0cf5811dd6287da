"""A placement that cannot use the run's proxy is refused before anything is probed, from the models' configs alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from trace_dist.config import (
    ContinualConfig,
    DataConfig,
    MaskConfig,
    ModelConfig,
    ProjectionConfig,
    RunConfig,
    TaskConfig,
)
from trace_dist.continual import proxy as of_proxy
from trace_dist.models.origin import Origin
from trace_dist.stages.shapes import check_masks

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3}
SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "vocab_size": 37}
LLAMA = LlamaConfig(**SMALL)
GPT2 = GPT2Config(n_embd=24, n_layer=2, n_head=6, vocab_size=37)
EXPERTS = MixtralConfig(**SMALL, num_local_experts=2)


@pytest.fixture(autouse=True)
def vocabularies(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    """What the tokenizers in the folders know."""
    known: dict[str, dict[str, int]] = {"target": {"a": 0}, "proxy": {"a": 0}}
    monkeypatch.setattr(
        of_proxy, "load_tokenizer", lambda path: SimpleNamespace(get_vocab=lambda: known[Path(path).name])
    )
    return known


def run_of(folder: Path, placement: str, target: PreTrainedConfig, proxy: PreTrainedConfig) -> RunConfig:
    for name, config in (("target", target), ("proxy", proxy)):
        config.save_pretrained(folder / name)
    return RunConfig(
        run_dir=str(folder / "run"),
        target=ModelConfig(str(folder / "target")),
        tasks=[TaskConfig("one", "one.jsonl")],
        proxy=ModelConfig(str(folder / "proxy")),
        projection=ProjectionConfig(placement),
    )


@pytest.mark.parametrize(
    ("placement", "target", "proxy", "message"),
    [
        ("identity", LLAMA, LLAMA, "the proxy does not say which part of the target it is"),
        ("align", GPT2, LLAMA, "layer 0 has no q weight of its own"),
        ("align", LLAMA, GPT2, "layer 0 has no q weight of its own"),
        ("align", EXPERTS, LLAMA, "a layer has no output and down weights of its own"),
    ],
)
def test_what_a_placement_cannot_use_is_refused(
    placement: str, target: PreTrainedConfig, proxy: PreTrainedConfig, message: str, tmp_path: Path
) -> None:
    cfg = run_of(tmp_path, placement, target, proxy)
    with pytest.raises(ValueError, match=f"projection.placement='{placement}': {message}"):
        check_masks(cfg)
    check_masks(replace(cfg, projection=ProjectionConfig("magnitude")))
    # The places of whole tensors are not looked for.
    check_masks(replace(cfg, mask=MaskConfig(density=0.5, granularity="tensor")))


def test_align_is_refused_for_other_tokens_and_for_images(
    tmp_path: Path, vocabularies: dict[str, dict[str, int]]
) -> None:
    cfg = run_of(tmp_path, "align", LLAMA, LLAMA)
    check_masks(cfg)
    with pytest.raises(ValueError, match="'image'; choose another placement"):
        check_masks(replace(cfg, data=DataConfig(modality="image"), continual=ContinualConfig(["retrieved"])))
    vocabularies["proxy"] = {"b": 0}
    with pytest.raises(ValueError, match="does not read the target's tokens"):
        check_masks(cfg)


def test_a_piece_of_the_target_is_accepted_and_of_another_refused(tmp_path: Path) -> None:
    cfg = run_of(tmp_path, "identity", LLAMA, LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    Origin("of somebody", "model.layers", [1]).save(tmp_path / "proxy")
    check_masks(cfg)
    Origin("of somebody", "other.layers", [0], hidden=[*range(23), 99]).save(tmp_path / "proxy")
    with pytest.raises(ValueError, match="nothing of the proxy is found in the target"):
        check_masks(cfg)
