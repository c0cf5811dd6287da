"""What races: masked training, full fine-tuning, PEFT LoRA and PEFT SHiRA, each as its users run it under DeepSpeed ZeRO-3.

All train one model of one shape in bf16 with an fp32 master, on the same random batch. LoRA and SHiRA get the rank with which
they train as many parameters as the masks do. Peers run with DeepSpeed's defaults and the loss of transformers, and as
``full, tuned`` and ``LoRA, tuned`` with what masked training has beside masks (``sharding.zero3.zero3_config``,
``sharding.gloo``, ``train.cross_entropy``): what a user gains, and what the method alone does. LoRA is not gathered in whole
blocks, on which DeepSpeed 0.19 crashes: adapters of the lowest block get a gradient after DeepSpeed has freed it.

[Note: attention] On a CPU and for sequences this short, torch's fused attention is slower than transformers' unfused one, most of
all backward; unless told otherwise, all contestants get the unfused one there.

[Note: floor] A mask of one row in the lowest layer, which nobody wants to train. All that such a step does, every method does
that trains all layers of a frozen model: the forward pass, and the gradients of activations back to the lowest layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from trace_dist.benchmarks.peers import with_adapters, with_liger
from trace_dist.config import Backend
from trace_dist.data.slices import sliced
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.models.blocks import decoder_blocks, whole_blocks
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import shard
from trace_dist.sharding.comm import Comm
from trace_dist.sharding.dense import dense_engine, dense_states
from trace_dist.sharding.sequence import SequenceParallel
from trace_dist.sharding.zero3 import load_deepspeed, zero3_config
from trace_dist.train.loss import forward_nll_sum
from trace_dist.utils import dist

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Model shapes: that of the results on a CPU, two for a GPU, and one that shows in seconds that everything runs."""
NARROW = ", narrow"
"""After a shape's name: as deep, with the tiny shape's sizes."""
ATTENTION = ("auto", "eager", "sdpa")
"""transformers' unfused attention, and torch's fused one."""
MASKED = {"element": 1, "block 64": 64, "row": 0}
"""Masked contestants and their block size."""
FLOOR = "floor"  # [Note: floor]
TUNED = ", tuned"
FSDP2 = ", FSDP2"
COMPILED = ", compiled"
"""By torch.compile, block by block."""
LIGER = ", Liger"
"""With Liger's kernels."""
OFFLOAD = ", offload"
"""States in host memory."""
CONTESTANTS = (
    *(*MASKED, "full", "LoRA", "SHiRA"),
    *(f"full{TUNED}", f"LoRA{TUNED}"),
    *(f"row{FSDP2}", f"full{FSDP2}", f"row{OFFLOAD}"),
    FLOOR,
)
FOR_GPUS = (f"full{FSDP2}{COMPILED}", *(f"{name}{TUNED}{LIGER}" for name in ("full", "LoRA")))
"""They race where they are asked for: a compiler takes minutes, and Liger's kernels want a GPU."""
KNOWN = tuple(dict.fromkeys((*CONTESTANTS, *(f"{name}{OFFLOAD}" for name in MASKED))))
"""What can be built; of masks whose states the host keeps one races."""


@dataclass(frozen=True)
class Race:
    """One model, one batch.

    Attributes:
        shape: one of ``SHAPES``.
        density: masked share of the linear layers' weights.
        micro_batch: examples per rank and step.
        sequence: tokens per example.
        attention: one of ``ATTENTION``; ``auto`` is what is faster ([Note: attention]).
        sequence_parallel: ranks that share examples (sharding/sequence.py).
    """

    shape: str = "SmolLM2-135M"
    density: float = 0.05
    micro_batch: int = 4
    sequence: int = 128
    attention: str = "auto"
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r}: unknown; use one of {', '.join(ATTENTION)}")
        if self.shape.removesuffix(NARROW) not in SHAPES:
            raise ValueError(f"shape={self.shape!r}: unknown; use one of {', '.join(SHAPES)}")

    def model(self) -> PreTrainedModel:
        """Random weights, the same on every rank."""
        torch.manual_seed(0)
        attention = self.attention
        if attention == "auto":
            attention = "sdpa" if torch.cuda.is_available() else "eager"
        with dist.local_device():
            model = AutoModelForCausalLM.from_config(
                self.config(), attn_implementation=attention, dtype=torch.bfloat16
            )
        if self.sequence_parallel > 1:
            SequenceParallel(model, self.sequence_parallel, Comm())
        return model.train()

    def config(self) -> Any:
        """What the shape is made of."""
        shape = SHAPES[self.shape.removesuffix(NARROW)]
        if self.shape.endswith(NARROW):
            shape = SHAPES["tiny"] | {"num_hidden_layers": shape["num_hidden_layers"]}
        return LlamaConfig(**shape)

    def tokens(self) -> Tensor:
        """The tokens of this rank's group, on the CPU, the same on any device: [micro_batch, sequence]."""
        generator = torch.Generator().manual_seed(dist.rank() // self.sequence_parallel)
        shape = (self.micro_batch, self.sequence)
        return torch.randint(self.config().get_text_config().vocab_size, shape, generator=generator)

    def part(self) -> tuple[dict[str, Tensor], Tensor]:
        """What this rank reads of them, on the CPU, and its labels."""
        ids = self.tokens()
        if self.sequence_parallel == 1:
            return {"input_ids": ids}, ids
        index = dist.rank() % self.sequence_parallel
        part = sliced({"input_ids": ids, "labels": ids}, self.sequence_parallel, index)
        return part, part.pop("labels")

    def batch(self) -> dict[str, Tensor]:
        """The same with labels, as transformers take them, where the model computes."""
        inputs, labels = self.part()
        if self.sequence_parallel > 1:
            inputs |= {"shift_labels": labels[:, 1:].contiguous()}
            labels = labels[:, :-1]
        return {name: each.to(dist.local_device()) for name, each in {**inputs, "labels": labels}.items()}


@dataclass(frozen=True)
class Contestant:
    """A training step in three phases, and how many parameters all ranks together train.

    ``states`` are the tensors that this rank keeps between steps, by category.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    step: Callable[[], None]
    num_trained: int
    states: Callable[[], dict[str, list[Tensor]]]

    def once(self) -> None:
        """All three phases."""
        self.backward(self.forward())
        self.step()


def build(name: str, race: Race) -> Contestant:
    """Set one of ``KNOWN`` up on this job's ranks."""
    if name.startswith(f"full{FSDP2}"):
        return _full_fsdp2(race, compiled=name.endswith(COMPILED))
    backend: Backend = "fsdp2" if name.endswith(FSDP2) else "zero3"
    offload: Literal["none", "cpu"] = "cpu" if name.endswith(OFFLOAD) else "none"
    name = name.removesuffix(FSDP2).removesuffix(OFFLOAD)
    if name not in (*MASKED, FLOOR):
        return _peer(name, race)
    model = shard(race.model(), backend)
    if name == FLOOR:
        layouts = layouts_for(model, "row", 1, "linear")
        lowest = next(iter(layouts))
        mask = Mask({lowest: torch.zeros(1, dtype=torch.int32)}, {lowest: layouts[lowest]}, "row")
    else:
        granularity = name.split()[0]
        mask = random_mask(
            layouts_for(model, granularity, MASKED[name], "linear"), granularity, race.density, 0
        )
    return _masked(model, mask, race, offload)


def _masked(model: ShardedModel, mask: Mask, race: Race, offload: Literal["none", "cpu"]) -> Contestant:
    optimizer = MaskedAdamW(model, mask, lr=1e-4, max_grad_norm=1.0, offload=offload)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    num_trained = sum(support.num_entries for support in optimizer.supports)
    return Contestant(own_loss(model, race), model.backward, step, num_trained, optimizer.model_states)


def _full_fsdp2(race: Race, compiled: bool) -> Contestant:
    """As torchtitan does it: fp32 shards, gathered in bf16 by blocks, gradients summed in fp32, torch's fused AdamW.

    torchtitan compiles the blocks, too.
    """
    dist.ensure_group()
    module: Any = race.model().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(dist.local_device().type, (dist.world_size(),))
    if compiled:
        for block in decoder_blocks(module).values():
            block.compile()
    for part in (*decoder_blocks(module).values(), module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    weights = list(module.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

    def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
        return [tensor.to_local() for tensor in tensors]

    def step() -> None:
        grads = locals_of(weight.grad for weight in weights)
        norm = torch.stack(torch._foreach_norm(grads)).square().sum()
        norm = dist.sum_over_ranks(norm).sqrt()
        torch._foreach_mul_(grads, (1 / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
        optimizer.zero_grad()

    def states() -> dict[str, list[Tensor]]:
        kept = [optimizer.state[weight] for weight in weights]
        moments = {name: locals_of(state[name] for state in kept) for name in ("exp_avg", "exp_avg_sq")}
        return {"weights": locals_of(weights), **moments}

    num_trained = sum(weight.numel() for weight in weights)
    return Contestant(
        _transformers_loss(module, race), lambda loss: loss.backward(), step, num_trained, states
    )


def own_loss(model: Any, race: Race) -> Callable[[], Tensor]:
    """The mean loss of this rank's tokens, as trace_dist computes it."""
    inputs, labels = race.part()  # labels on the CPU, as those of real batches: they are read there
    inputs = {name: each.to(dist.local_device()) for name, each in inputs.items()}
    return lambda: forward_nll_sum(model, inputs, labels, 1 / labels[:, 1:].numel())


def _transformers_loss(module: Any, race: Race) -> Callable[[], Tensor]:
    """The same as transformers compute it, or Liger in their place."""
    batch = race.batch()
    return lambda: module(**batch).loss


def _peer(name: str, race: Race) -> Contestant:
    module: Any = race.model()
    liger = name.endswith(LIGER)
    if liger:
        with_liger(module)
    name = name.removesuffix(LIGER)
    method = name.removesuffix(TUNED)
    if method != "full":
        module = with_adapters(method, module, race.density).bfloat16()
    num_trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    zero: dict[str, Any] = {}
    if name != method:
        load_deepspeed()  # with our all-gather
        blocks = whole_blocks(module).values() if method == "full" else ()
        zero = zero3_config(torch.bfloat16, blocks=blocks)["zero_optimization"]
    engine = dense_engine(module, torch.bfloat16, zero)
    loss = own_loss(engine, race) if name != method and not liger else _transformers_loss(engine, race)
    return Contestant(loss, engine.backward, engine.step, num_trained, partial(dense_states, engine))
