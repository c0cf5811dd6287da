"""One rank of ``test_sequence``: ``rank_script.py FOLDER SIZE CASE...``; trains each case on ranks of which SIZE share rows."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from engine.training import refused, save_state
from sequence.cases import CASES, CONFIG, Cut, MortalBatches, resumed, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.profiling.measure import SavedTensors
from trace_dist.sharding import ShardedModel
from trace_dist.train.learner import MaskedLearner
from trace_dist.train.loop import train_steps
from trace_dist.train.loss import answer_nll_sum_
from trace_dist.utils import dist


def cases(out: Path, size: int, names: list[str]) -> dict[str, Any]:
    """Losses and norms; whole models lie beside them."""
    found = {}
    for name in names:
        model = shard(CASES[name].model(), CASES[name].backend, sequence_parallel=size)
        outcome = train(CASES[name], model)
        save_state(out / f"{name}.safetensors", outcome.state)
        found[name] = {"losses": outcome.losses, "norms": outcome.norms}
    return found


def own_loop(size: int) -> list[float]:
    """What stands in ``shard``: a loop of one's own over whole batches."""
    case = CASES["heads"]
    model = shard(case.model(), "zero3", sequence_parallel=size)
    optimizer = MaskedAdamW(model, case.case.mask(model), lr=CONFIG.rate, eps=CONFIG.eps)
    groups = dist.world_size() // size
    stream, losses = case.batches(rank=dist.rank() // size, world_size=groups), []
    for _ in range(2):
        step, total = next(stream), torch.zeros((), dtype=torch.float64)
        for batch in step.micro_batches:
            part = model.sequence.slice(batch)
            labels = part.pop("labels")
            loss = answer_nll_sum_(model(**part).logits, labels) / step.num_answer_tokens
            model.backward(loss, reduction="sum")
            total += loss.detach().double()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(dist.sum_over_ranks(total)))
    return losses


def whole_rows(size: int) -> dict[str, Any]:
    """Forward passes on whole rows and generation, after one on slices: as without sequence parallelism."""
    case = CASES["recomputed"]
    plain, model = case.model().eval(), shard(case.model(), "zero3", sequence_parallel=size).eval()
    ids = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(dist.rank()))
    with torch.no_grad():
        part = model.sequence.slice({"input_ids": ids, "labels": ids})
        part.pop("labels")
        model(**part)
        same = torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    answers = model.module.generate(input_ids=ids, **options)
    return {"same": same, "generated": torch.equal(answers, plain.generate(input_ids=ids, **options))}


def saved(size: int) -> dict[str, int]:
    """Bytes that autograd keeps for a backward pass over rows of 48 tokens: of slices, and of whole rows."""
    case = CASES["heads"]
    model = shard(case.model(), "zero3", sequence_parallel=size)
    MaskedAdamW(model, case.case.mask(model))
    ids = torch.randint(3, 101, (2, 48), generator=torch.Generator().manual_seed(0))
    whole, found = {"input_ids": ids, "labels": ids}, {}
    for name, batch in (("slice", model.sequence.slice(whole)), ("whole", whole)):
        labels = batch.pop("labels")
        tensors = SavedTensors(model.module)
        with tensors:
            loss = answer_nll_sum_(model(**batch).logits, labels)
        model.backward(loss)
        found[name] = tensors.nbytes
    return found


def cut(folder: Path, size: int) -> None:
    """A training that ends after its second step, and leaves a checkpoint."""
    with suppress(Cut):
        resumed(shard(CASES["heads"].model(), "zero3", sequence_parallel=size), folder, MortalBatches)


def refusals(size: int) -> dict[str, str]:
    """What cannot be shared, and why."""

    def sharded(kind: str, attention: str = "sdpa", **options: Any) -> ShardedModel:
        known = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 1, **options}
        config = AutoConfig.for_model(kind, **known)
        module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return shard(module, "zero3", sequence_parallel=size)

    llama = {"intermediate_size": 8, "num_attention_heads": 4}

    def trained(kind: str, **options: Any) -> None:
        model = sharded(kind, **options)
        learner = MaskedLearner(model, Mask.random(model, 0.5, "row", seed=0), CONFIG)
        train_steps(learner, CASES["heads"].batches(), CONFIG, 1)

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))

    def tensor_parallel() -> Any:
        module = CASES["heads"].model()
        plan = {f"model.layers.{layer}.mlp.up_proj": ColwiseParallel() for layer in range(2)}
        return parallelize_module(module, mesh["tensor"], plan)

    mask = CASES["heads"].case.mask(CASES["heads"].model())
    both = fully_shard(tensor_parallel(), mesh=mesh["data"])
    return {
        "tensor parallel": refused(lambda: MaskedAdamW(tensor_parallel(), mask)),
        "tensor parallel, sharded": refused(lambda: shard(tensor_parallel(), "zero3")),
        "tensor parallel and fsdp2": refused(lambda: MaskedAdamW(both, mask)),
        "heads": refused(lambda: sharded("llama", **llama | {"num_attention_heads": 3})),
        "key heads": refused(
            lambda: sharded("llama", **llama | {"num_attention_heads": 12, "num_key_value_heads": 3})
        ),
        "attention": refused(lambda: sharded("llama", "eager", **llama)),
        # with weights that are large enough for a state to be felt behind rounding
        "stateful": refused(
            lambda: trained(
                "lfm2", **llama, layer_types=["conv"], num_key_value_heads=4, initializer_range=0.5
            )
        ),
        "ranks": refused(lambda: shard(CASES["heads"].model(), "zero3", sequence_parallel=4)),
    }


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    out, size, names = Path(arguments[0]), int(arguments[1]), arguments[2:]
    dist.ensure_group()
    found: dict[str, Any] = {"cases": cases(out, size, names)}
    if size == dist.world_size():
        cut(out / "checkpoints", size)
        found |= {"own loop": own_loop(size), "whole rows": whole_rows(size), "saved": saved(size)}
        found["refused"] = refusals(size)
    (out / f"rank{dist.rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    main()
