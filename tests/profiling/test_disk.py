"""What a training will write is what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.bank.delta import extract_delta
from trace_dist.checkpoint import save_checkpoint
from trace_dist.profiling.disk import disk_bytes
from trace_dist.profiling.estimate import Estimator
from trace_dist.profiling.memory_setup import MemorySetup


@pytest.mark.parametrize(
    ("granularity", "state_dtype", "master", "keep_best"),
    [("element", "float32", True, False), ("row", "8bit", False, True)],
)
def test_files_have_the_predicted_sizes(granularity, state_dtype, master, keep_best, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
    )
    config.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    model = shard(LlamaForCausalLM(config).bfloat16(), "single")
    mask = Mask.random(model, 0.1, granularity)
    optimizer = MaskedAdamW(model, mask, state_dtype=state_dtype, master=master)
    best = {support.name: optimizer.values(support) for support, _ in optimizer.compact()}
    folder = save_checkpoint(tmp_path / "checkpoints", 1, optimizer, {}, best=best if keep_best else None)
    extract_delta(model, mask, "task").save(tmp_path / "delta.safetensors")
    setup = MemorySetup(
        str(tmp_path / "model"),
        dtype="bfloat16",
        granularity=granularity,
        density=0.1,
        state_dtype=state_dtype,
        master=master,
        keep_best=keep_best,
    )
    found = disk_bytes(Estimator(setup.model, setup.dtype), setup)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    header = 20_000
    assert found.checkpoint <= written <= 1.02 * found.checkpoint + header
    delta = (tmp_path / "delta.safetensors").stat().st_size
    assert 0.99 * found.delta <= delta <= 1.02 * found.delta + header
