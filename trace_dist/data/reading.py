"""The splits of a source: a file, a folder, or a dataset on the hub.

``datasets`` reads all but JSON: it takes texts that look like dates for dates, refuses a column that holds numbers and texts, and
does not name the line of a fault. It also finds which files of a folder make which split.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache as once
from pathlib import Path
from typing import Any

import datasets
from pyarrow.parquet import read_metadata

from trace_dist.config import TaskConfig
from trace_dist.config.examples import example_file
from trace_dist.data.bars import bars_on_main
from trace_dist.data.cache import caching, place_of
from trace_dist.data.files import GZIP, cells_header, read_json_lines, read_json_values, read_text
from trace_dist.data.tables import Table
from trace_dist.parts import IMAGES
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
TRAIN, TEST, VALIDATION = "train", "test", "validation"
Splits = dict[str, Table]
PACKAGED = "images:"
"""Begins the path of a set of images that comes with a package (``data.images``)."""
_TRACE_FILES = {TRAIN: "train.json", TEST: "test.json", VALIDATION: "eval.json"}
"""The layout of the TRACE continual-learning benchmark (arXiv 2310.06762)."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CARD_FILES = re.compile(r"data_(files|dir)\W*:")
"""In the card of a dataset: which files are of which split."""
_LONGEST_REASON = 300
MOST_NAMED = 3
"""Of the files that are left out."""


def read_splits(task: TaskConfig) -> tuple[Splits, bool]:
    """The splits of a task's path, and whether the source says itself which rows are for testing.

    Raises:
        ValueError: there is no such source, it cannot be read, or a field is set that has no meaning for it.
    """
    field = f"{task.where}.path={task.path!r}"
    if str(task.path).startswith(PACKAGED):
        return _packaged(task, str(task.path).removeprefix(PACKAGED)), True
    path = example_file(str(task.path), f"{task.where}.path")
    if not path.exists():
        return _from_hub(task, field), False
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    trace = any((path / file).is_file() for file in _TRACE_FILES.values())
    _check_local(task, ("revision", "subset") if path.is_file() or saved or trace else ("revision",))
    if path.is_file():
        return _from_file(path, field), False
    if saved:
        return _from_disk(path, field)
    if trace:
        return _from_trace_folder(path, task, field), True
    return _from_folder(path, task, field), False


def _check_local(task: TaskConfig, keys: tuple[str, ...]) -> None:
    for key in keys:
        if getattr(task, key) is not None:
            raise ValueError(
                f"{task.where}.{key}={getattr(task, key)!r}: has no meaning for {task.path!r}, which is on this machine; "
                "leave it out"
            )


def _packaged(task: TaskConfig, name: str) -> Splits:
    _check_local(task, ("revision", "subset"))
    return {
        split: Table(f"{PACKAGED}{name}, split {split}", data)
        for split, data in IMAGES.load(name).splits().items()
    }


def _from_hub(task: TaskConfig, field: str) -> Splits:
    name = str(task.path)
    if _kind(Path(name)) in _READERS or not _HUB_ID.fullmatch(name):
        raise ValueError(f"{field}: no such file or folder; fix the path")
    cure = (
        f"check the path, or the id, {task.where}.subset and revision on the hub, and the network "
        "(without one, give the path of a copy)"
    )
    what = f"{field}: no such file or folder, and no dataset of the hub that can be read"
    with _one_line(what, cure), bars_on_main():
        loaded = datasets.load_dataset(name, task.subset, revision=task.revision)
    return {split: Table(f"{name}, split {split}", data) for split, data in loaded.items()}


def _from_file(path: Path, field: str) -> Splits:
    tested = beside(path, TEST)
    files = {TRAIN: [path]} | ({TEST: [tested]} if tested.is_file() else {})
    return _from_files(files, field)


def beside(path: Path, split: str) -> Path:
    """Where the examples of a split lie beside a file: ``quiz.csv`` -> ``quiz.test.csv``."""
    plain = path.with_suffix("") if path.suffix.lower() == GZIP else path
    return path.with_name(f"{plain.stem}.{split}{path.name.removeprefix(plain.stem)}")


def _from_files(files: Mapping[str, list[Path]], field: str) -> Splits:
    """Each split from its files, all of one kind."""
    kinds = sorted({_kind(file) for each in files.values() for file in each})
    if len(kinds) != 1 or kinds[0] not in _READERS:
        ends = ", ".join(kind or "nothing" for kind in kinds)
        raise ValueError(
            f"{field}: the files end in {ends}; give files of one kind out of {', '.join(_READERS)}"
        )
    reader = _READERS[kinds[0]]
    return {
        split: Table(
            str(each[0]) if len(each) == 1 else f"{each[0].parent}, split {split}", reader(each, field)
        )
        for split, each in files.items()
    }


def _kind(file: Path) -> str:
    kind = file.suffix.lower()
    return file.with_suffix("").suffix.lower() if kind == GZIP else kind


def _from_trace_folder(path: Path, task: TaskConfig, field: str) -> Splits:
    found = {}
    for split, name in _TRACE_FILES.items():
        named = {TRAIN: task.split, TEST: task.test_split}.get(split, split)
        if (path / name).is_file():
            found[split] = Table(str(path / name), read_json_values(path / name))
        elif named is None:
            has = sorted(file.name for file in path.glob("*.json"))
            raise ValueError(f"{field}: no {name}, the folder has {has}; add the missing split")
    return found


def _from_disk(path: Path, field: str) -> tuple[Splits, bool]:
    with _one_line(f"{field}: cannot be read", "save the dataset again with save_to_disk"):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return {TRAIN: Table(str(path), loaded)}, False
    return {split: Table(f"{path}/{split}", data) for split, data in loaded.items()}, True


def _from_folder(path: Path, task: TaskConfig, field: str) -> Splits:
    """A folder as datasets on the hub have it; files of other kinds than ours are left to ``datasets``."""
    kinds = f"files that end in {', '.join(_READERS)}"
    cure = (
        f"give a folder with {kinds}, or one written by datasets' save_to_disk; of several configurations name one by "
        f"{task.where}.subset"
    )
    with _one_line(f"{field}: holds no data that can be read", cure):
        builder = datasets.load_dataset_builder(str(path), task.subset)
        files = {
            str(split): [Path(file) for file in each] for split, each in builder.config.data_files.items()
        }
    _check_whole(path, files, field, may_train=TRAIN not in files and task.split is None)
    if all(_kind(file) in _READERS for each in files.values() for file in each):
        return _from_files(files, field)
    with _one_line(f"{field}: cannot be read", cure):
        place = place_of(file for each in files.values() for file in each)
        builder = datasets.load_dataset_builder(str(path), task.subset, cache_dir=place)
        with bars_on_main():
            builder.download_and_prepare()
        loaded = builder.as_dataset()
    return {split: Table(f"{path}, split {split}", data) for split, data in loaded.items()}


def _check_whole(path: Path, files: Mapping[str, list[Path]], field: str, may_train: bool) -> None:
    """Raise ValueError where some files are named as a split, and others of their kind, which ``datasets`` passes over, are not:
    the examples to test on would be trained. Where something else is trained, say which files are left out.

    What a card names is as its author wants it.
    """
    card = path / "README.md"
    if card.is_file() and _CARD_FILES.search(read_text(card)):
        return
    taken = {file.resolve() for each in files.values() for file in each}
    left = _of_kinds(path, {_kind(file) for file in taken}, taken)
    cure = f"put {TRAIN} into the names of files or folders to train on, or give one file as the path"
    if left and may_train:
        raise ValueError(
            f"{field}: {left[0]} is of no split, beside those of {' and '.join(sorted(files))} by their names; {cure}"
        )
    if left:
        _say_left_out(field, ", ".join(map(str, left[:MOST_NAMED])), len(left), cure)


def _of_kinds(path: Path, kinds: set[str], taken: Collection[Path]) -> list[Path]:
    """Files of some kinds below a folder, relative to it; without hidden ones and those that are taken."""
    found = []
    for file in sorted(path.rglob("*")):
        place = file.relative_to(path)
        hidden = any(part.startswith((".", "__")) for part in place.parts)
        if _kind(file) in kinds and not hidden and file.is_file() and file.resolve() not in taken:
            found.append(place)
    return found


@once
def _say_left_out(field: str, names: str, num: int, cure: str) -> None:
    logger.warning("%s: left out %d of its files (%s), whose names say no split; %s", field, num, names, cure)


def _json_lines(files: list[Path], field: str) -> list[Any]:
    return [value for file in files for value in read_json_lines(file)]


def _json(files: list[Path], field: str) -> list[Any]:
    return [value for file in files for value in read_json_values(file)]


def _csv(files: list[Path], field: str, separator: str = ",") -> datasets.Dataset:
    """Every cell is text, as it stands in the file: 007 stays 007, and NA is a word."""
    header, *others = [cells_header(file, separator) for file in files]
    for file, other in zip(files[1:], others, strict=True):
        if other != header:
            raise ValueError(
                f"{file}:1: the header is {other}, that of {files[0].name} {header}; make them equal"
            )
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return _loaded("csv", files, field, features=features, keep_default_na=False, sep=separator)


def _tsv(files: list[Path], field: str) -> datasets.Dataset:
    return _csv(files, field, "\t")


def _parquet(files: list[Path], field: str) -> datasets.Dataset:
    # Programs that write in parallel leave files without rows, over which ``datasets`` stumbles.
    with _one_line(f"{field}: cannot be read", "write the file again"):
        filled = [file for file in files if read_metadata(file).num_rows]
    if not filled:
        raise ValueError(f"{field}: {files[0].name} holds no rows; give it examples")
    return _loaded("parquet", filled, field)


def _text(files: list[Path], field: str) -> datasets.Dataset:
    for file in files:
        read_text(file)
    return _loaded("text", files, field, encoding="utf-8-sig")


def _loaded(kind: str, files: list[Path], field: str, **options: Any) -> datasets.Dataset:
    with _one_line(f"{field}: cannot be read", "write the file again"), bars_on_main():
        names = [glob.escape(str(file)) for file in files]
        return datasets.load_dataset(
            kind, data_files=names, split=TRAIN, cache_dir=place_of(files), **options
        )


_READERS: dict[str, Callable[[list[Path], str], datasets.Dataset | list[Any]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
}


@contextmanager
def _one_line(what: str, cure: str) -> Iterator[None]:
    """Turns an error of ``datasets``, arrow, pandas or the hub, which all raise kinds of their own, into one line;
    what the cache cannot take is no fault of the data."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, OSError):
            with suppress(OSError), caching():
                raise cause from None
        reason = " ".join(str(cause).split())[:_LONGEST_REASON] or type(cause).__name__
        raise ValueError(f"{what} ({reason}); {cure}") from error
