"""``save_pretrained`` writes what ``shard`` accepts, and says in config.json which dtype the weights have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.cases import CASES
from engine.rank_nf4 import coded
from engine.savable import MAKERS, load, make
from engine.toy import Toy
from full_disk import full_disk
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from trace_dist import Mask, MaskedAdamW, shard
from trace_dist.models.weight_files import INDEX, WEIGHTS, open_weights
from trace_dist.sharding import ShardedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA = LoraConfig(r=2, target_modules=["q_proj"])


def assert_read_back(name: str, folder: Path, model: nn.Module, dtype: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == dtype
    assert config["architectures"] == [type(model).__name__]
    state, expected = load(name, folder).state_dict(), model.state_dict()
    assert state.keys() <= expected.keys()
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAKERS)
def test_read_back(name: str, dtype: str, tmp_path: Path) -> None:
    model = shard(make(name, DTYPES[dtype]), "single")
    model.save_pretrained(tmp_path)
    assert_read_back(name, tmp_path, make(name, DTYPES[dtype]), dtype)
    saved = {key for file in tmp_path.glob("*.safetensors") for key in load_file(file)}
    assert "dropout_head.weight" in saved or name != "another head"


@pytest.mark.launcher
@pytest.mark.parametrize("backend", ["zero3", "fsdp2"])
@pytest.mark.parametrize("name", ["causal", "classifier", "encoder without pooler"])
def test_read_back_from_ranks(world, backend: str, name: str) -> None:
    folder = world(2).folder / f"saved-{backend}-{name}"
    assert_read_back(name, folder, make(name, torch.bfloat16), "bfloat16")


@pytest.mark.launcher
def test_all_ranks_hear_that_rank_0_cannot_write(world) -> None:
    for report in world(2).reports:
        assert "exported.safetensors: cannot be written" in report["exporting"]["no folder"]


def test_the_folder_is_tried_before_weights_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shard(make("causal", torch.float32), "single")
    monkeypatch.setattr(model, "full_state_dict", None)
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"file.*: cannot be written .*choose another folder"):
            model.save_pretrained(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("existed", [False, True])
def test_half_a_checkpoint_is_none(existed: bool, tmp_path: Path) -> None:
    folder, model = tmp_path / "out", shard(make("causal", torch.float32), "single")
    if existed:
        model.save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        model.module.model.norm.weight.add_(1)
    with full_disk(5000), pytest.raises(ValueError, match="out: cannot be written"):
        model.save_pretrained(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert folder.exists() == existed


def test_a_new_checkpoint_replaces_one_of_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make("causal", torch.float32).save_pretrained(tmp_path, max_shard_size="5KB")
    (tmp_path / "notes.txt").touch()
    module = make("causal", torch.float32)
    with torch.no_grad():
        module.model.norm.weight.add_(1)
    shard(module, "single").save_pretrained(".")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert_read_back("causal", tmp_path, module, "float32")
    with open_weights(tmp_path) as files:
        assert torch.equal(files.tensor("model.norm.weight"), module.model.norm.weight)


def test_the_model_itself_is_not_changed(tmp_path: Path) -> None:
    model = shard(make("causal", torch.bfloat16), "single")
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == before


def test_a_4_bit_model_is_saved_in_the_dtype_of_its_values(tmp_path: Path) -> None:
    module = coded("element")
    shard(module, "single").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


def test_of_other_modules_the_weights_are_saved(tmp_path: Path) -> None:
    shard(Toy(), "single").save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == Toy().state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in Toy().state_dict().items())


@pytest.mark.parametrize("name", ["causal", "tied", "encoder"])
def test_a_model_that_is_pickled_whole_leaves_its_mask_here(name: str, tmp_path: Path) -> None:
    """As by ``torch.save(model)``: it had ended in a traceback."""
    model, ids = make(name, torch.float32).eval(), torch.arange(8)[None]
    optimizer = MaskedAdamW(model, Mask.random(model, 0.5, maskable="all"), lr=0.1)
    torch.save(model, tmp_path / "model.pt")
    model(ids)[0].square().mean().backward()
    optimizer.step()
    torch.save(model, tmp_path / "later.pt")
    read = torch.load(tmp_path / "later.pt", weights_only=False)
    assert torch.equal(read(ids)[0], model(ids)[0])
    assert {type(part) for part in read.modules()} == {
        type(part) for part in make(name, torch.float32).modules()
    }
    first = torch.load(tmp_path / "model.pt", weights_only=False)
    again = MaskedAdamW(first, optimizer.mask, lr=0.1)
    first(ids)[0].square().mean().backward()
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters(), strict=True))
    model(ids)[0].square().mean().backward()  # the one that was saved is as it was
    assert optimizer.model.is_attached(optimizer.supports)


def wrapped_by_peft() -> nn.Module:
    return get_peft_model(make("causal", torch.float32), LORA)


ADAPTERS = {
    "wrapped": wrapped_by_peft,
    "injected": lambda: inject_adapter_in_model(LORA, make("causal", torch.float32)),
}


@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters_are_refused_before_training(how: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds PEFT adapters .*merge_and_unload"):
        shard(ADAPTERS[how](), "single")
    # A loop of one's own may train such a model and save it by itself.
    module = ADAPTERS[how]()
    model: ShardedModel = MaskedAdamW(module, Mask.random(module, 0.5, maskable="base_layer")).model
    with pytest.raises(ValueError, match=r"holds PEFT adapters .*merge_and_unload"):
        model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_merged_adapter_is_welcome(tmp_path: Path) -> None:
    model = shard(wrapped_by_peft().merge_and_unload(), "single")
    model.save_pretrained(tmp_path)
    assert_read_back("causal", tmp_path, make("causal", torch.float32), "float32")


def test_weights_of_an_earlier_checkpoint_go(tmp_path: Path) -> None:
    """Shards before one file, and one file before shards."""
    new = make("causal", torch.bfloat16)
    make("causal", torch.float32).save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / INDEX).is_file()
    shard(new, "single").save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == [WEIGHTS]
    assert_read_back("causal", tmp_path, make("causal", torch.bfloat16), "bfloat16")


def test_experts_of_a_model_that_its_config_does_not_describe(tmp_path: Path) -> None:
    """They lie apart in the files, as transformers writes and reads them."""
    module = replace(CASES["element"], family="qwen2_moe").model()
    module.save_pretrained(tmp_path / "plain")
    module.another = nn.Linear(2, 2)
    shard(module, "single").save_pretrained(tmp_path / "more")
    plain, more = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "more"))
    assert more.keys() == plain.keys() | {"another.weight", "another.bias"}
    assert all(torch.equal(more[name], value) for name, value in plain.items())
