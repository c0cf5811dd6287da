"""Real steps of masked training on random weights and tokens, their memory beside the estimate.

    trace-dist memory profile --model config.json --backend zero3
    deepspeed --num_gpus 2 --module trace_dist memory profile --model config.json --backend zero3

Nothing is downloaded but a config. Every rank builds the whole model in host memory once, before it is sharded.

[Note: warm-up] A training of the model's first layer alone runs before, so that what libraries load and keep from their first use
is in the baseline. Its tensors are held: DeepSpeed holds on to a closed model for a while, and what it let go later would be
missing in the peak. Resident memory of a CPU counts Python's objects too, of which hooks make thousands for each layer. So on one
CPU rank the whole model is trained first, and its tensors are emptied by hand. On several ranks that does not reach all of them.
"""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trace_dist.masks.mask import Mask
from trace_dist.models.nf4 import quantize_nf4
from trace_dist.optim.masked_adamw import MaskedAdamW
from trace_dist.profiling.estimate import Estimator, load_config
from trace_dist.profiling.measure import SavedTensors, Timeline, Watch, bytes_now, settle_allocator
from trace_dist.profiling.memory_setup import MemorySetup
from trace_dist.profiling.states import tensor_bytes
from trace_dist.sharding.build import shard
from trace_dist.train.loss import forward_nll_sum
from trace_dist.utils import dist


@dataclass(frozen=True)
class Measured:
    """What one rank saw, in bytes.

    Attributes:
        states: by category, from the tensors that are there after a backward pass; host memory of ``offload`` included.
        between: activations that autograd keeps and gathered copies of weights, between forward and backward; without activations
            where they are recomputed, since checkpoints keep theirs to themselves.
        timeline: memory over the steps beyond that before the model was built.
    """

    states: dict[str, int]
    between: dict[str, int]
    timeline: Timeline


def run_profile(setup: MemorySetup, steps: int = 4) -> dict[str, Any]:
    """Measure a setup on the ranks of this job. Collective.

    Args:
        setup: what to train; ``world_size`` and ``device`` are those of the job, and no checkpoints are kept.
        steps: optimizer steps; DeepSpeed prefetches from the second on.

    Returns:
        ``setup``, ``estimate``, ``measured`` and relative ``errors`` of states and peak, and the ``timeline`` of rank 0.

    Raises:
        ValueError: a value makes no sense, the model has no readable config, or its steps are too small to be measured.
    """
    if steps < 2:
        raise ValueError(
            f"steps={steps}: must be at least 2, since ZeRO-3 prefetches from the second step on; raise it"
        )
    dist.init_distributed()
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    setup = replace(setup, world_size=dist.world_size(), device=device, checkpoint_async=False)
    estimate = Estimator(setup.model, setup.dtype, setup.quantize)(setup)
    settle_allocator()
    before = _baseline()
    config = load_config(setup.model)
    whole = setup.device == "cpu" and setup.world_size == 1
    _, left = _train(config if whole else _one_layer(config), setup, 3, before)
    for tensor in left if whole else ():
        tensor.untyped_storage().resize_(0)
    baseline = _baseline()
    measured, _ = _train(load_config(setup.model), setup, steps, baseline)
    del left
    ranks = dist.gather_objects((measured.states, measured.timeline.peak))
    states, peaks = [sum(found.values()) for found, _ in ranks], [peak for _, peak in ranks]
    return {
        "setup": asdict(setup),
        "estimate": estimate.as_dict(),
        "measured": {
            "states": measured.states,
            "between": measured.between,
            "peak": max(peaks),
            "rank_states": states,
            "rank_peaks": peaks,
        },
        "libraries": baseline - before,
        "errors": {
            "states": sum((*estimate.states.values(), *estimate.host.values())) / max(states) - 1,
            "peak": _peak_error(estimate.peak, max(peaks), setup.model),
        },
        "timeline": asdict(measured.timeline),
    }


def _peak_error(estimated: int, measured: int, model: str) -> float:
    """How far an estimated peak is off; raises ValueError where the steps were lost in what the process held before."""
    if measured <= 0:
        raise ValueError(
            f"model={model!r}: its steps took no more memory than was there before, so nothing was measured; give a larger "
            "model, or raise sequence_length"
        )
    return estimated / measured - 1


def _one_layer(config: Any) -> Any:
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    return config


def _baseline() -> int:
    gc.collect()
    return bytes_now(dist.local_device())


def _train(config: Any, setup: MemorySetup, steps: int, baseline: int) -> tuple[Measured, list[Tensor]]:
    """What was seen, and the tensors of this rank's states."""
    torch.manual_seed(0)  # every rank builds the same model
    module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup.dtype))
    if setup.quantize == "nf4":
        quantize_nf4(module)
    module.train()
    if setup.activation_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = shard(module, setup.backend, setup.sequence_parallel)
    del module
    mask = Mask.random(model, setup.density, setup.granularity, 0, setup.block, setup.maskable)
    optimizer = MaskedAdamW(
        model, mask, lr=1e-4, state_dtype=setup.state_dtype, master=setup.master, offload=setup.offload
    )
    ids = torch.randint(
        config.get_text_config().vocab_size,
        (setup.micro_batch_size, setup.sequence_length),
        device=model.device,
    )
    inputs, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids
    if model.sequence is not None:  # the ranks have drawn the same tokens
        inputs = model.sequence.slice({**inputs, "labels": ids})
        labels = inputs.pop("labels")
    states: dict[str, int] = {}
    with Watch(model.device, baseline) as watch:
        for _ in range(steps):
            with watch.phase("forward"):
                loss = forward_nll_sum(model, inputs, labels, 1 / ids.numel())
            with watch.phase("backward"):
                model.backward(loss)
                del loss
            states = {name: tensor_bytes(tensors) for name, tensors in optimizer.model_states().items()}
            with watch.phase("step"):
                optimizer.step()
                optimizer.zero_grad()
    saved = SavedTensors(model.module)
    with saved:
        loss = forward_nll_sum(model, inputs, labels, 1 / ids.numel())
    between = {"gathered": tensor_bytes(model.copies())}
    if not setup.activation_checkpointing:
        between = {"activations": saved.nbytes, **between}
    model.backward(loss)
    tensors = [tensor for each in optimizer.model_states().values() for tensor in each]
    tensors += [model.local(name) for name in model.names()]
    close = getattr(model, "close", model.detach)
    close()
    return Measured(states, between, watch.timeline), tensors
