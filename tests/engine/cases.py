"""What is trained in the parity tests: small models whose sizes nothing divides, masks of every kind, ragged batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trace_dist import Mask

VOCAB, LENGTH, ROWS = 101, 9, 6

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 51,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": {**_LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    "gpt2": {"vocab_size": VOCAB, "n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": 64, **_NO_DROPOUT},
    # Norms that add 1, scaled embeddings, heads that do not tile the hidden size.
    "gemma3_text": {**_LLAMA, "num_key_value_heads": 1, "head_dim": 8},
    # Biases, learned positions, embeddings narrower than the layers.
    "opt": {
        **{key: value for key, value in _LLAMA.items() if key != "intermediate_size"},
        "ffn_dim": 51,
        "word_embed_proj_dim": 20,
        "dropout": 0.0,
    },
    # Fused experts [5, ...], of which a rank's tokens leave some out (test_parity), and a shared one.
    "qwen2_moe": {
        **_LLAMA,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 7,
    },
    # Weights of one row, a bias of one element: with three ranks some own nothing of them.
    "sliver": {**_LLAMA, "intermediate_size": 1, "mlp_bias": True, "attention_bias": True},
}


@dataclass(frozen=True)
class Case:
    """One training run.

    ``threshold``: ZeRO-3's persistence threshold. ``accumulation``: micro-batches per step on each rank. ``eps`` is
    large because some gradients are zero but for rounding (key biases), and Adam would blow their noise up to ``lr``.
    """

    name: str
    granularity: str
    family: str = "llama"
    maskable: str = "linear"
    density: float = 0.3
    dtype: str = "float32"
    steps: int = 4
    accumulation: int = 1
    checkpointing: bool = False
    num_layers: int = 2
    threshold: int = 500
    max_grad_norm: float | None = 1.0
    lr: float = 1e-2
    weight_decay: float = 0.1
    eps: float = 1e-5

    def model(self) -> PreTrainedModel:
        """The base model; norms and biases are random too."""
        kind = "llama" if self.family == "sliver" else self.family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = {"num_hidden_layers": self.num_layers}
            config = AutoConfig.for_model(kind, **{**FAMILIES[self.family], **layers})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                mean = 1.0 if parameter.dim() == 1 and "bias" not in name else 0.0
                parameter.data.normal_(mean, 0.1)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():  # and no buffer: rotary frequencies stay fp32, as when loading
            parameter.data = parameter.data.to(getattr(torch, self.dtype))
        return model.train()

    def mask(self, model: Any) -> Mask:
        """The mask, of a plain or a sharded model."""
        return Mask.random(model, self.density, self.granularity, seed=1, block=12, maskable=self.maskable)


CASES = {
    case.name: case
    for case in (
        Case("element", "element"),
        Case("element-everything", "element", maskable="all"),
        Case("block-accumulated-recomputed", "block", density=0.5, accumulation=2, checkpointing=True),
        Case(
            "everything-accumulated-recomputed", "block", maskable="all", accumulation=2, checkpointing=True
        ),
        Case("row", "row"),
        Case("column", "column"),
        Case("head", "head"),
        Case("tensor", "tensor", maskable="q_proj|down_proj|norm", density=1.0),
        Case("qwen2-biases", "element", "qwen2", maskable="all"),
        Case("qwen2-rows", "row", "qwen2", maskable="all", density=0.6),
        Case("qwen2-columns", "column", "qwen2", maskable="all", accumulation=2, checkpointing=True),
        Case("gpt2-conv1d", "block", "gpt2", maskable="all"),
        Case("neox", "element", "gpt_neox", maskable="all"),
        Case("gemma", "row", "gemma3_text", maskable="all"),
        Case("opt", "element", "opt", maskable="all"),
        Case("experts", "element", "qwen2_moe", maskable="all"),
        Case("experts-columns", "column", "qwen2_moe"),
        Case("sliver", "element", "sliver", maskable="all", density=0.6, threshold=0),
        Case("bf16", "element", dtype="bfloat16", maskable="all", steps=20),
    )
}


def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Global batches (input_ids, labels), [ROWS, LENGTH] int64; rows have 0 to 8 labelled tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(case.steps):
        ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
        labels = ids.clone()
        for row in range(ROWS):
            labels[row, : 1 + (row * 3) % LENGTH] = -100
        labels[-1] = -100
        found.append((ids, labels))
    return found
