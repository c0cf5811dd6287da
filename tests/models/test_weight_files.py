"""Reading parts of a checkpoint, and refusing what must not or cannot be read."""

from __future__ import annotations

import errno
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from trace_dist.models.fingerprint import fingerprint
from trace_dist.models.loading import load_model, load_tokenizer
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.models.weight_files import INDEX, WEIGHTS, open_weights, resolve
from trace_dist.sharding.build import load_sharded

SHAPES = [(), (1,), (7,), (5, 3), (1, 9), (3, 4, 5), (2, 3, 1, 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One tensor of each shape: 0, 1, 2, ... in row-major order."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = {str(shape): torch.arange(float(math.prod(shape))).reshape(shape) for shape in SHAPES}
    save_file({**tensors, "counts": torch.arange(3)}, folder / WEIGHTS)
    (folder / "config.json").write_text("{}")
    return folder


@given(st.sampled_from(SHAPES), st.data())
def test_any_interval_is_read(folder, shape, data):
    start = data.draw(st.integers(0, math.prod(shape)))
    stop = data.draw(st.integers(start, math.prod(shape)))
    with open_weights(folder) as files:
        assert files.shape(str(shape)) == shape
        assert files.read(str(shape), start, stop).tolist() == list(range(start, stop))


def test_headers_tell_types(folder):
    with open_weights(folder) as files:
        assert files.is_floating_point("(7,)")
        assert not files.is_floating_point("counts")


def test_an_interval_outside_is_a_broken_invariant(folder):
    with open_weights(folder) as files, pytest.raises(AssertionError, match="outside"):
        files.read("(7,)", 0, 8)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "runs/base/model", "~/nothing-here"])
def test_a_missing_folder_is_an_error(path):
    for load in (load_model, load_tokenizer, resolve):
        with pytest.raises(ValueError, match="no such folder; fix the path"):
            load(path)


def test_an_unknown_hub_id_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a local folder nor a model that the hub delivers"):
        load_model("nobody-at-all/no-such-model")


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)


def test_pickled_weights_are_refused(saved):
    folder = saved("gpt2")
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pickled weights only.*safetensors copy"):
        load_model(folder)


def test_a_missing_or_corrupt_part_is_an_error(saved):
    folder = saved("gpt2")
    part = sorted(folder.glob("*.safetensors"))[0]
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"corrupt|cannot be loaded"):
        load_model(folder)
    part.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded|missing"):
        load_model(folder)


def test_a_parameter_that_is_not_stored_is_an_error(make_model, tmp_path):
    """transformers alone would fill it with random numbers and go on."""
    model = make_model("llama")
    state = {name: value for name, value in model.named_parameters() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 parameters .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer_is_an_error(saved):
    with pytest.raises(ValueError, match="no readable tokenizer"):
        load_tokenizer(saved("llama"))


def test_layers_without_end_are_refused_before_they_are_built(saved):
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31}))
    for read in (load_model, lambda path: load_model(path, quantize="nf4")):
        with pytest.raises(
            ValueError, match=r"no readable config \(ValueError: num_hidden_layers=2147483648 is more than"
        ):
            read(folder)


def test_settings_that_make_no_sense_are_one_line(saved):
    """They are looked at when a text is first read, and when weights are loaded in shards."""
    folder = saved("llama")
    char_tokenizer({"t": ["say ab"]}, ["ab"]).save_pretrained(folder)
    load_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "x"}))
    with pytest.raises(
        ValueError, match=r"^model\.path=.*: no readable tokenizer \(TypeError: .*\); save one there"
    ):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"do_sample": [')
    with pytest.raises(
        ValueError, match=r"generation_config\.json: cannot be read .*; mend it, or delete it"
    ):
        load_model(folder, quantize="nf4")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_model_gives_the_saved_values(saved, make_model, dtype):
    model = load_model(saved("llama"), dtype)
    assert not model.training
    for (name, param), expected in zip(
        model.named_parameters(), make_model("llama").parameters(), strict=True
    ):
        assert torch.equal(param, expected.to(getattr(torch, dtype))), name


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"w": 3}}'),
        *('{"weight_map": {"w": "/etc/passwd"}}', '{"weight_map": {"w": "../x.safetensors"}}'),
        f'{{"weight_map": {{"w": "{"x" * 300}"}}}}',
        *('{"weight_map": {"w": "absent.safetensors"}}', '{"weight_map": {"w": "a\\u0000b"}}', "[" * 100_000),
    ],
)
def test_an_index_that_is_none_is_one_line(content, saved):
    folder = saved("llama")
    (folder / INDEX).write_text(content)
    for read in (fingerprint, load_model):
        with pytest.raises(
            ValueError,
            match=r"index\.json( lists it)?: (damaged|not valid JSON|fetch .* again)|name too long",
        ) as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_weights_that_the_system_does_not_let_be_read(saved, monkeypatch):
    """They are not damaged, and safetensors says of them that they are missing."""
    folder, opened = saved("llama"), Path.open

    def refuse(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"the weights file cannot be read \(Permission denied\); fix its"):
        fingerprint(folder)


def test_an_index_that_names_a_tensor_in_the_wrong_file(saved):
    folder = saved("llama")
    index = json.loads((folder / INDEX).read_text())
    names = sorted(index["weight_map"], key=index["weight_map"].__getitem__)
    index["weight_map"][names[0]] = index["weight_map"][names[-1]]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has not what"):
        load_model(folder)


def test_of_one_file_and_shards_the_one_file_is_read(saved, make_model):
    """As by transformers."""
    folder = saved("llama")
    assert (folder / INDEX).is_file()
    other = make_model("llama", seed=1)
    save_file({name: value.clone() for name, value in other.state_dict().items()}, folder / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    with open_weights(folder) as files:
        assert torch.equal(files.tensor(name), other.state_dict()[name])
    assert torch.equal(load_model(folder).state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("read", [load_model, partial(load_sharded, backend="single")])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantize": "NF4"}, "quantize='NF4': unknown; use none or nf4"),
        ({"quantize": "int8"}, "quantize='int8': unknown; use none or nf4"),
        ({"dtype": "fp32"}, "dtype='fp32': unknown; use float32 or bfloat16"),
        ({"dtype": "float16"}, "dtype='float16': unknown; use float32 or bfloat16"),
        ({"dtype": torch.float16}, "dtype=torch.float16: unknown; use float32 or bfloat16"),
    ],
)
def test_what_weights_cannot_be_loaded_as(read, options, words):
    """Said before the folder is looked for."""
    with pytest.raises(ValueError, match=words):
        read("/no/such/folder", **({"dtype": "float32"} | options))


def test_a_dtype_of_torch_is_taken(saved):
    model = load_sharded(str(saved("llama")), torch.bfloat16)
    assert {model.like(name).dtype for name in model.names()} == {torch.bfloat16}
