"""LoRA's rank at an equal number of trained parameters, against the parameters that PEFT really adds."""

from __future__ import annotations

import pytest
from engine.cases import CASES
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from trace_dist.models.adapters import lora_rank


def num_added(module: PreTrainedModel, rank: int) -> int:
    """Parameters of PEFT's adapters of a rank on every linear layer."""
    adapted = get_peft_model(module, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["element", "gpt2-conv1d"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_trains_the_wanted_number_of_parameters(name: str, rank: int) -> None:
    module = CASES[name].model()
    wanted = num_added(CASES[name].model(), rank)
    assert lora_rank(module, wanted) == rank
    assert lora_rank(module, wanted * (rank + 0.4) / rank) == rank
    assert lora_rank(module, wanted * (rank + 0.6) / rank) == rank + 1


def test_layers_that_share_a_weight_have_an_adapter_each() -> None:
    """Layers that are one module, as of a block that is used twice, have one."""

    def model() -> PreTrainedModel:
        module = CASES["element"].model()
        first, *others = (layer.self_attn for layer in module.model.layers)
        for other in others:
            other.k_proj.weight, other.v_proj = first.k_proj.weight, first.v_proj
        return module

    assert lora_rank(model(), num_added(model(), 20)) == 20


def test_the_rank_is_never_zero() -> None:
    assert lora_rank(CASES["element"].model(), 1) == 1
