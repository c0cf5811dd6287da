"""One identity per base model, whatever its dtype and file layout; another for any other model."""

from __future__ import annotations

import pytest
import torch

from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.models.loading import load_model


def test_the_same_model_in_any_form(saved, make_model, tmp_path):
    folder = saved("llama")
    identity = fingerprint(folder)
    assert len(identity) == 32
    assert int(identity, 16) >= 0
    assert fingerprint(str(folder)) == identity
    assert fingerprint(make_model("llama")) == identity
    assert fingerprint(load_model(folder, "bfloat16")) == identity
    load_model(folder).save_pretrained(tmp_path / "one-file")
    load_model(folder, "bfloat16").save_pretrained(tmp_path / "half")
    assert fingerprint(tmp_path / "one-file") == fingerprint(tmp_path / "half") == identity


def test_a_tied_tensor_stored_twice_changes_nothing(make_model, tmp_path):
    model = make_model("llama")
    twice = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in twice
    model.save_pretrained(tmp_path, state_dict=twice)
    assert fingerprint(tmp_path) == fingerprint(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"num_hidden_layers": 3},
        {"intermediate_size": 51},
        {"rope_theta": 5e5},
        {"hidden_act": "gelu"},
    ],
)
def test_another_model_differs(changes, make_model):
    assert fingerprint(make_model("llama", **changes)) != fingerprint(make_model("llama"))


def test_training_changes_it(make_model):
    model = make_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        for param in model.parameters():
            param[torch.rand_like(param) < 0.05] += 0.01
    assert fingerprint(model) != before


def test_signs_of_zero_do_not_count(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        positive = fingerprint(model)
        model.model.norm.weight.neg_()
    assert fingerprint(model) == positive


def test_a_file_of_another_model_is_refused():
    check_same("a" * 32, "a" * 32, "mask rev.safetensors")
    with pytest.raises(
        ValueError, match=r"mask rev\.safetensors: made for the model with fingerprint aaaa.*bbbb"
    ):
        check_same("a" * 32, "b" * 32, "mask rev.safetensors")
