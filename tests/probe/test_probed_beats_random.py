"""The point of probing: at 5 % density a probed mask learns what a random one of the same size does not."""

from __future__ import annotations

import copy

import datasets
import pytest
import torch
from probe.setting import VOCABULARY, make_model
from transformers import LlamaForCausalLM

from trace_dist.config import ProbeConfig, TrainConfig
from trace_dist.data.batches import Batches
from trace_dist.masks import Mask
from trace_dist.masks.ops import layouts_for, mask_from_scores, random_mask
from trace_dist.probe.importance import unit_importance
from trace_dist.probe.warm_start import warm_start
from trace_dist.sharding.build import shard
from trace_dist.train.learner import DenseLearner, MaskedLearner
from trace_dist.train.loop import train_steps

TRAIN = TrainConfig(lr=1e-2, batch_size=32, micro_batch_size=32, warmup_steps=5)
DENSITY = 0.05


def permutation_task(seed: int) -> Batches:
    """Walk along a permutation of the vocabulary from a given token; another seed is another task."""
    successor = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = []
    for token in range(VOCABULARY):
        walk = [token]
        for _ in range(5):
            walk.append(successor[walk[-1]])
        rows.append({"input_ids": walk, "labels": [-100, *walk[1:]], "num_answer_tokens": 5})
    return Batches(datasets.Dataset.from_list(rows), batch_size=32, micro_batch_size=32, seed=0, pad_id=0)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """A model that has learned one permutation."""
    model = make_model(hidden_size=48, num_key_value_heads=3)
    result = train_steps(
        DenseLearner(model, model.parameters(), TRAIN, 3e-3), permutation_task(0), TRAIN, 100
    )
    assert result.losses[-1][1] < 0.5
    return model


def learned(base: LlamaForCausalLM, mask: Mask) -> float:
    """Loss on the other permutation after some masked steps, in nats per token."""
    learner = MaskedLearner(shard(copy.deepcopy(base)), mask, TRAIN)
    losses = train_steps(learner, permutation_task(1), TRAIN, 60).losses
    return sum(loss for _, loss in losses[-5:]) / 5


@pytest.fixture(scope="module")
def random_loss(base: LlamaForCausalLM) -> float:
    """The better of two random masks."""
    layouts = layouts_for(base, "element", 1, "linear")
    return min(learned(base, random_mask(layouts, "element", DENSITY, seed)) for seed in range(2))


@pytest.mark.parametrize("score", ["l2", "fisher", "l2_fisher"])
def test_a_probed_mask_learns_more_than_a_random_one(
    score: str, base: LlamaForCausalLM, random_loss: float
) -> None:
    layouts = layouts_for(base, "element", 1, "linear")
    probe = ProbeConfig(steps=20, lr=1e-3, fisher_batches=3)
    trace = warm_start(copy.deepcopy(base), list(layouts), permutation_task(1), probe, TRAIN)
    mask = mask_from_scores(unit_importance(trace, layouts, score), layouts, "element", DENSITY)
    assert abs(mask.density - DENSITY) * mask.num_maskable < 1
    assert random_loss > 1.0  # otherwise the task is too easy to tell masks apart
    assert learned(base, mask) < 0.75 * random_loss
