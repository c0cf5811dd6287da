"""Code that a model's folder brings runs where it was asked for by name, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from engine.cases import CASES

from trace_dist.cli.parser import parse, run_config
from trace_dist.models import fingerprint, load_model, load_tokenizer, trust
from trace_dist.models.prune import prune
from trace_dist.models.rest import copy_rest
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.sharding.build import load_sharded

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
READERS: dict[str, Callable[[Path], object]] = {
    "model": load_model,
    "shards": lambda folder: load_sharded(str(folder), "float32", "single", "nf4"),
    "tokenizer": load_tokenizer,
    "fingerprint": fingerprint,
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes lie in its folder; ``ran`` beside it is there once they have run."""
    monkeypatch.setattr(trust, "_TRUSTED", set())
    folder = tmp_path / "model"
    CASES["element"].model().save_pretrained(folder)
    char_tokenizer({"t": ["ab"]}, ["ba"]).save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    for file, change in {
        "config.json": {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        },
    }.items():
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | change))
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_nothing_of_it_runs_unless_asked_for(own: Path, reader: str) -> None:
    """Nor is anybody asked whether it may."""
    try:
        READERS[reader](own)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 - the tokenizer can be read without
    assert not (own.parent / "ran").exists()


def test_it_runs_where_it_was_named(own: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(own)
    trust.trust(own)
    model = load_model(own)
    assert type(model).__name__ == "OwnModel"
    assert (own.parent / "ran").exists()
    other = load_sharded(str(own), "float32", "single")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_configuration_names_it(own: Path, trusted: bool) -> None:
    path = own.parent / "run.yaml"
    target = {"path": str(own), **({"trust_remote_code": True} if trusted else {})}
    tasks = [{"name": "t", "path": "t.jsonl"}]
    path.write_text(yaml.safe_dump({"run_dir": str(own.parent / "run"), "target": target, "tasks": tasks}))
    cfg = run_config(parse(["train", "--config", str(path)])["train"])
    assert cfg.target.trust_remote_code is trusted
    assert trust.is_trusted(own) is trusted


@pytest.mark.parametrize("trusted", [False, True])
def test_a_copy_brings_the_code_that_may_run(own: Path, trusted: bool) -> None:
    """In files of its own, of which a config alone brings one."""
    (own / "parts.py").write_text("WIDTH = 1\n")
    (own / "kept").mkdir()
    if trusted:
        trust.trust(own)
    copy_rest(own, own / "kept")
    assert [file.name for file in sorted((own / "kept").glob("*.py"))] == ["own.py", "parts.py"] * trusted


def test_a_proxy_that_was_cut_out_of_it(own: Path) -> None:
    proxy = own.parent / "proxy"
    trust.trust(own)
    assert not trust.is_trusted(proxy)
    prune(own, proxy, 1)
    assert type(load_model(proxy)).__name__ == "OwnModel"


def test_a_proxy_that_is_yet_to_be_cut_may_run_what_its_target_may(own: Path) -> None:
    path, proxy = own.parent / "run.yaml", own.parent / "proxy"
    path.write_text(
        yaml.safe_dump(
            {
                "run_dir": str(own.parent / "run"),
                "target": {"path": str(own), "trust_remote_code": True},
                "proxy": {"path": str(proxy), "prune": {"keep_layers": 1}},
                "tasks": [{"name": "t", "path": "t.jsonl"}],
            }
        )
    )
    run_config(parse(["train", "--config", str(path)])["train"])
    proxy.mkdir()
    assert trust.is_trusted(proxy)
