"""Readers of models that others have made: GGUF files, tokenizers, and what says how they are used."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import gguf
import torch
from fuzz.reader import Reader, silently
from transformers import GenerationConfig, ViTImageProcessor

from trace_dist.data import encode_prompt, pad_id, stop_ids
from trace_dist.modality.image import load_reader
from trace_dist.models.gguf import convert_gguf
from trace_dist.models.loading import load_tokenizer, with_generation
from trace_dist.models.tokenizer import char_tokenizer
from trace_dist.utils.files import write_json


def make_gguf(folder: Path) -> Path:
    """A Llama of one layer, with a tokenizer of characters."""
    path, width, words = (
        folder / "model.gguf",
        32,
        ["<unk>", "<s>", "</s>", *map(chr, range(97, 123)), "ab", "cd"],
    )
    with redirect_stderr(io.StringIO()):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64), writer.add_embedding_length(width), writer.add_block_count(1)
        writer.add_feed_forward_length(width), writer.add_head_count(2), writer.add_head_count_kv(1)
        (
            writer.add_layer_norm_rms_eps(1e-5),
            writer.add_rope_dimension_count(16),
            writer.add_rope_freq_base(1e4),
        )
        writer.add_vocab_size(len(words)), writer.add_tokenizer_model("gpt2"), writer.add_token_list(words)
        writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)]), writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0)
        shapes = {"token_embd": (len(words), width), "output": (len(words), width), "output_norm": (width,)}
        for part in ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            shapes[f"blk.0.{part}"] = (width, width)
        shapes |= {f"blk.0.{part}": (width // 2, width) for part in ("attn_k", "attn_v")}
        shapes |= {f"blk.0.{part}": (width,) for part in ("attn_norm", "ffn_norm")}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", torch.rand(shape).numpy())
        writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
        writer.close()
    return path


def read_gguf(path: Path) -> None:
    out = path.with_name("converted")
    try:
        silently(lambda: convert_gguf(str(path), out))
    finally:
        rmtree(out, ignore_errors=True)


@cache
def tokenizer_files() -> dict[str, bytes]:
    """Those of a small tokenizer."""
    with TemporaryDirectory() as name:
        char_tokenizer({"t": ["say ab", "say ac"]}, ["ab"]).save_pretrained(name)
        return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def make_tokenizer(file: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in tokenizer_files().items():
            (folder / name).write_bytes(content)
        write_json(folder / "config.json", {"model_type": "llama"})
        (folder / "model.safetensors").write_bytes(b"")
        return folder / file

    return make


def read_tokenizer(path: Path) -> None:
    """As far as training uses it."""
    tokenizer = load_tokenizer(path.parent)
    tokenizer.decode(encode_prompt(["say ab"], tokenizer)[0])
    pad_id(tokenizer), stop_ids(tokenizer)


def make_generation(folder: Path) -> Path:
    GenerationConfig(
        max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2], pad_token_id=0
    ).save_pretrained(folder)
    return folder / "generation_config.json"


def read_generation(path: Path) -> None:
    with_generation(SimpleNamespace(eval=lambda: None), path.parent)  # type: ignore[arg-type]


def make_processor(file: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
        labels = {"label2id": {"one": 0, "two": 1}, "id2label": {"0": "one", "1": "two"}}
        write_json(
            folder / "config.json",
            {"model_type": "vit", "architectures": ["ViTForImageClassification"], **labels},
        )
        (folder / "model.safetensors").write_bytes(b"")
        return folder / file

    return make


def read_processor(path: Path) -> None:
    assert load_reader(path.parent).names


READERS = (
    Reader("tokenizer", "json", make_tokenizer("tokenizer.json"), read_tokenizer),
    Reader("settings of a tokenizer", "json", make_tokenizer("tokenizer_config.json"), read_tokenizer),
    Reader("settings of generation", "json", make_generation, read_generation),
    Reader("settings of an image processor", "json", make_processor("preprocessor_config.json"), read_processor),
    Reader("classes of an image model", "json", make_processor("config.json"), read_processor),
    Reader("GGUF", "binary", make_gguf, read_gguf),
)  # fmt: skip
