"""One identity per base model, whatever its dtype and file layout; another for any other model."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trace_dist.models.content import CHUNK, content_sums
from trace_dist.models.fingerprint import ROUNDED, SAMPLED, check_same, fingerprint, fuller, same_model
from trace_dist.models.loading import load_model
from trace_dist.sharding.sequence import check_divisible


def test_the_same_model_in_any_form(saved, make_model, tmp_path):
    folder = saved("llama")
    identity = fingerprint(folder)
    assert len(identity) == 64
    assert int(identity, 16) >= 0
    assert fingerprint(str(folder)) == identity
    assert fingerprint(make_model("llama")) == identity
    assert same_model(fingerprint(load_model(folder, "bfloat16")), identity)
    load_model(folder).save_pretrained(tmp_path / "one-file")
    load_model(folder, "bfloat16").save_pretrained(tmp_path / "half")
    assert fingerprint(tmp_path / "one-file") == identity
    assert same_model(fingerprint(tmp_path / "half"), identity)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_value_counts(dtype, make_model, tmp_path):
    """Also those that are not sampled, in their last bit, in a folder and in a module."""
    model = make_model("llama").to(dtype)
    before = fingerprint(model)
    model.save_pretrained(tmp_path / "before")
    weight = model.model.layers[0].mlp.up_proj.weight.data
    bits = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
    for row, column in ((3, 5), (11, 29), (49, 34)):
        bits[row, column] ^= 1
        after = fingerprint(model)
        assert after[:SAMPLED] == before[:SAMPLED]
        assert not same_model(before, after)
        model.save_pretrained(tmp_path / "after")
        assert fingerprint(tmp_path / "after") == after
        with pytest.raises(ValueError, match="some of the weights were changed since; load the model it was"):
            check_same(before, after, "bank")
        bits[row, column] ^= 1
    assert fingerprint(model) == before == fingerprint(tmp_path / "before")


def test_values_that_change_places_count(make_model):
    model = make_model("llama")
    before = fingerprint(model)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[3, 5], weight[11, 29] = weight[11, 29].clone(), weight[3, 5].clone()
    assert fingerprint(model)[:SAMPLED] == before[:SAMPLED]
    assert not same_model(before, fingerprint(model))


def test_a_copy_in_bfloat16_is_the_same_model_and_no_other(make_model):
    model, other = make_model("llama"), make_model("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[3, 5] *= 1 + 2**-20
    one, two = fingerprint(model), fingerprint(other)
    copy = fingerprint(model.to(torch.bfloat16))
    assert copy != one
    assert same_model(one, copy)
    assert same_model(copy, one)
    # rounded they are the same, but neither is the rounded one
    assert one[:ROUNDED] == two[:ROUNDED]
    assert not same_model(one, two)


def test_the_identity_of_an_earlier_release(saved):
    """It had 32 digits, which are those of the samples."""
    identity = fingerprint(saved("llama"))
    assert same_model(identity[:32], identity)
    assert same_model(identity, identity[:32])
    assert fuller(identity[:32], identity) == identity
    assert not same_model("0" * 32, identity)
    assert same_model("aaaa", "aaaa")
    assert not same_model("aaaa", "aaab")


def test_sums_of_parts_add_up():
    """Wherever the parts begin; and they are what the formula says."""
    values = torch.randn(2 * CHUNK + 777)
    whole = content_sums(values)
    cuts = [0, 5, CHUNK - 1, CHUNK, CHUNK + 300, len(values)]
    parts = [content_sums(values[a:b], a) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.stack(parts).sum(0), whole)
    assert content_sums(values[:0]).tolist() == [0, 0]
    places = [0, 7, CHUNK + 3]
    few = torch.zeros(len(values))
    few[places] = values[places]
    weights = [splitmix(i % CHUNK, 0) | 1 for i in places]
    weights = [w * (splitmix(i // CHUNK, 1) | 1) for w, i in zip(weights, places, strict=True)]
    bits = [int(values[i].view(torch.int32)) for i in places]
    expected = sum(w * b for w, b in zip(weights, bits, strict=True)) % 2**64
    assert int(content_sums(few)[1]) % 2**64 == expected


def splitmix(counter, key):
    """SplitMix64 in Python's integers."""
    x = (counter * 0x9E3779B97F4A7C15 + key) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_layers_may_differ_in_the_sizes_of_their_heads(tmp_path):
    """transformers refuses to say what such a config states of all layers."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 67, "vocab_size_per_layer_input": 67, "hidden_size_per_layer_input": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    config = AutoConfig.for_model("gemma4_text", **sizes, **layers, **heads)
    assert config.is_heterogeneous
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) == fingerprint(model)
    check_divisible(config, 2)
    with pytest.raises(ValueError, match="4 attention heads"):
        check_divisible(config, 3)
