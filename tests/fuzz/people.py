"""Readers of what people bring: tables, pictures, prompts, descriptions of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import datasets
import numpy as np
from fuzz.reader import Reader
from PIL import Image

from trace_dist.config import TaskConfig
from trace_dist.data.pictures import picture_of, uri_of
from trace_dist.data.sources import load_examples
from trace_dist.profiling.simulation.gpus import FOLDER, load_gpu
from trace_dist.serving.prompts import read_questions


def make_csv(folder: Path) -> Path:
    lines = ["prompt,answer,more", *(f'"say {i}, please",{i},{i % 3}' for i in range(40))]
    (folder / "task.csv").write_text("\n".join(lines) + "\n")
    return folder / "task.csv"


def make_text(folder: Path) -> Path:
    (folder / "task.txt").write_text("".join(f"line{i} of the text has number {i}\n" for i in range(40)))
    return folder / "task.txt"


def make_parquet(folder: Path) -> Path:
    rows = [{"prompt": f"say {i}", "answer": str(i), "more": [i]} for i in range(40)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "task.parquet")
    return folder / "task.parquet"


def read_by_datasets(path: Path) -> None:
    """What ``datasets`` keeps of each file goes again."""
    with TemporaryDirectory() as cache, patch.object(datasets.config, "HF_DATASETS_CACHE", Path(cache)):
        load_examples(TaskConfig("t", str(path), num_train=20, num_test=5), 0)


def make_picture(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)
        Image.fromarray(pixels).save(folder / f"picture.{kind}")
        return folder / f"picture.{kind}"

    return make


def read_picture(path: Path) -> None:
    assert picture_of(uri_of(path.read_bytes())).mode == "RGB"


def make_questions(folder: Path) -> Path:
    turns = '[{"role": "system", "content": "be short"}, {"role": "user", "content": "say 2"}]'
    lines = ('{"prompt": "say 1", "task": "copy"}', f'{{"messages": {turns}}}', '{"prompt": "say 3"}')
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "prompts.jsonl"


def make_gpu(folder: Path) -> Path:
    (folder / "own.yaml").write_text((FOLDER / "h100.yaml").read_text())
    return folder / "own.yaml"


READERS = (
    Reader("data, CSV", "text", make_csv, read_by_datasets),
    Reader("data, text", "text", make_text, read_by_datasets),
    Reader("data, Parquet", "binary", make_parquet, read_by_datasets),
    Reader("picture, PNG", "binary", make_picture("png"), read_picture),
    Reader("picture, JPEG", "binary", make_picture("jpeg"), read_picture),
    Reader("prompts to answer", "lines", make_questions, read_questions),
    Reader("a GPU of one's own", "yaml", make_gpu, lambda path: load_gpu(str(path))),
)
