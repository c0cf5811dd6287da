"""A cache that cannot be written is named as such: the data are not at fault, and another folder can be chosen."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pytest

from trace_dist.config import TaskConfig
from trace_dist.data.cache import cached, caching
from trace_dist.data.sources import load_examples

CURE = r"^HF_DATASETS_CACHE='{}': the cache of data cannot be written \({}\); make room there, or set HF_DATASETS_CACHE"


def refuse(code: int, path: str | None = None) -> NoReturn:
    raise OSError(code, os.strerror(code), *([] if path is None else [path]))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_made(code: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home of a user who has none, for one."""
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: refuse(code, str(cache.parent)))
    with pytest.raises(ValueError, match=CURE.format(cache, os.strerror(code))):
        cached("00", ".json")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_table_whose_copy_does_not_fit(
    code: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> NoReturn:
        try:
            refuse(code)
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    (tmp_path / "t.csv").write_text("prompt,answer\na,b\nc,d\n")
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=CURE.format(cache, os.strerror(code))):
        load_examples(TaskConfig("t", path=str(tmp_path / "t.csv")), 0)


def test_what_lies_elsewhere_is_said_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), caching():
        refuse(errno.EACCES, str(tmp_path / "data.csv"))
    with pytest.raises(FileNotFoundError), caching():
        refuse(errno.ENOENT)
