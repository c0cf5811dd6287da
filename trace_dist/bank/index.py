"""The index of a bank: what it holds, in one JSON file that is replaced whole at every change.

    {"format": "trace_dist.bank", "version": 2, "generation": 3, "base": fingerprint, "layer": -1,
     "tasks": [{"name", "folder", "files": {"delta.safetensors": {"bytes", "sha256"}, ...}, "facts": {...}}, ...],
     "checksum": SHA-256 of the rest}

It holds no date, so that two runs of the same work leave the same bytes. Where prompts are not represented by the mean over their
tokens, ``pooling`` says how, and the version is 3: releases that know the mean alone refuse such a bank.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any, get_args

from trace_dist.config.bank import Pooling
from trace_dist.run_folder import ADAPTED, DELTA, PROMPTS, RECIPE, SIGNATURE, SKETCH
from trace_dist.utils.files import read_json, sha256, write_json
from trace_dist.utils.names import BASE, check_task_name
from trace_dist.utils.sealed import check_version, json_checksum

FORMAT = "trace_dist.bank"
VERSION = 2
POOLED = 3
"""Version of an index that names a pooling."""
FOLDER = re.compile(r"[a-z0-9_][a-z0-9_-]{0,79}")
PLAIN = re.compile(r"[a-z0-9_][a-z0-9_-]{0,39}")
FACTS: dict[str, type] = {
    **dict.fromkeys(("clusters", "dim", "entries"), int),
    **dict.fromkeys(("mask", "granularity", "dtype"), str),
    "density": float,
}
"""Types of what ``bank.facts.describe`` says of a task."""


@dataclass(frozen=True)
class Member:
    """One file of a task."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Member:
        """The file as it lies there. Raises OSError where it cannot be read."""
        status = path.stat()
        if not S_ISREG(status.st_mode):
            # To open a pipe waits for whoever writes into it.
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return cls(status.st_size, sha256(path))


@dataclass(frozen=True)
class Record:
    """One task of a bank, or its base model, which has no delta."""

    name: str
    folder: str = ""
    """Name of its folder under ``tasks``; empty in a bank of version 1."""
    files: Mapping[str, Member] = field(default_factory=dict)
    """File name -> size and checksum; empty in a bank of version 1."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Small JSON values: clusters, dim, digest of the mask, entries, density, granularity, dtype, training (``bank.facts``)."""

    @property
    def key(self) -> tuple[str | None, str | None]:
        """Checksums of its delta and of its recipe, by which recipes name it; None where it has none."""
        delta, recipe = self.files.get(DELTA), self.files.get(RECIPE)
        return delta.sha256 if delta else None, recipe.sha256 if recipe else None


@dataclass(frozen=True)
class Index:
    """What a bank holds. A change makes a new index."""

    base: str
    """Fingerprint of the base model."""
    layer: int
    """Hidden layer that representations are taken from."""
    records: tuple[Record, ...] = ()
    """In the order in which they were added."""
    generation: int = 0
    """How often the bank was changed."""
    version: int = VERSION
    """Of the format: 1 until the first change by this release."""
    pooling: Pooling = "mean"
    """How a prompt's tokens become one representation."""

    def holder(self, key: tuple[str, str | None]) -> Record | None:
        """The record whose delta and recipe have these checksums (``recipe.Part.key``), if there is one."""
        return next((record for record in self.records if record.key == key), None)

    @property
    def names(self) -> list[str]:
        """Names of the records, in order."""
        return [record.name for record in self.records]

    def get(self, name: str) -> Record | None:
        """The record of a task, if there is one."""
        return next((record for record in self.records if record.name == name), None)

    def changed(self, records: Iterable[Record]) -> Index:
        """The next generation, with these records."""
        return replace(self, records=tuple(records), generation=self.generation + 1, version=VERSION)

    def folder_for(self, name: str, others: Iterable[str] = ()) -> str:
        """A name for the folder of a new task: readable, safe, and not taken, also by none of ``others``."""
        slug = name
        if not PLAIN.fullmatch(name):
            readable = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")[:40]
            slug = f"{readable or 'task'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken = {*(record.folder for record in self.records), *others}
        suffixes = ("", *(f"-{number}" for number in range(2, len(taken) + 3)))
        return next(slug + suffix for suffix in suffixes if slug + suffix not in taken)

    def save(self, path: Path) -> None:
        """Replace the index file."""
        value = {
            "format": FORMAT,
            "version": VERSION if self.pooling == "mean" else POOLED,
            "generation": self.generation,
            "base": self.base,
            "layer": self.layer,
            **({} if self.pooling == "mean" else {"pooling": self.pooling}),
            "tasks": [
                {
                    "name": record.name,
                    "folder": record.folder,
                    "files": {
                        name: {"bytes": member.num_bytes, "sha256": member.sha256}
                        for name, member in record.files.items()
                    },
                    "facts": record.facts,
                }
                for record in self.records
            ],
        }
        write_json(path, {**value, "checksum": json_checksum(value)})

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read an index. One of version 1 names no tasks: they stand in its signatures (``bank.legacy``).

        Raises:
            ValueError: missing, damaged, not an index, or of a newer version.
        """
        value = read_json(path)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f"{path}: this is not the index of a bank; give the folder of a bank")
        version = value.get("version")
        check_version(version, path, POOLED, 1)
        read = _Reader(path)
        rest = {key: part for key, part in value.items() if key != "checksum"}
        if version != 1 and value.get("checksum") != json_checksum(rest):
            raise read.damaged("wrong checksum")
        base, layer = read.field(value, "base", str), read.field(value, "layer", int)
        if version == 1:
            return cls(base, layer, version=1)
        records = tuple(map(read.record, read.field(value, "tasks", list)))
        read.distinct([record.name for record in records], "name")
        read.distinct([record.folder for record in records], "folder")
        generation, pooling = read.field(value, "generation", int), read.pooling(value)
        return cls(base, layer, records, generation, pooling=pooling)


@dataclass(frozen=True)
class _Reader:
    """Values out of an index file, checked one by one."""

    path: Path

    def damaged(self, reason: object) -> ValueError:
        return ValueError(
            f"{self.path}: damaged index of a bank ({reason}); restore the whole folder from a copy"
        )

    def field(self, value: Any, key: str, kind: type) -> Any:
        if not isinstance(value, dict) or type(value.get(key)) is not kind:
            raise self.damaged(f"{key} is missing or not {kind.__name__}")
        return value[key]

    def pooling(self, value: Any) -> Pooling:
        if value["version"] != POOLED:
            return "mean"
        found = self.field(value, "pooling", str)
        if found not in get_args(Pooling):
            raise self.damaged(f"the pooling {found!r:.100} is none that this release knows")
        return found  # type: ignore[no-any-return]

    def distinct(self, values: list[str], what: str) -> None:
        if len(set(values)) < len(values):
            raise self.damaged(f"a {what} occurs twice")

    def record(self, value: Any) -> Record:
        name, folder = self.field(value, "name", str), self.field(value, "folder", str)
        files = {
            file: Member(self.field(member, "bytes", int), self.field(member, "sha256", str))
            for file, member in self.field(value, "files", dict).items()
        }
        if any(not 0 <= member.num_bytes < 2**63 for member in files.values()):
            raise self.damaged(f"task {name!r:.200} has files of no size that a file can have")
        if name != BASE:
            try:
                check_task_name(name, f"{self.path}: task")
            except ValueError as error:
                raise self.damaged(error) from None
        if not FOLDER.fullmatch(folder):
            raise self.damaged(f"folder {folder!r:.200} is not the name of a folder")
        wanted = {SIGNATURE} if name == BASE else {SIGNATURE, DELTA}
        if not wanted <= files.keys() <= {SIGNATURE, DELTA, SKETCH, ADAPTED, PROMPTS, RECIPE}:
            raise self.damaged(f"task {name!r} has the files {sorted(files)!r:.200}")
        facts = self.field(value, "facts", dict)
        for key, kind in FACTS.items():
            if not isinstance(facts.get(key, kind()), kind):
                raise self.damaged(f"task {name!r} has the {key} {facts[key]!r:.100}")
        return Record(name, folder, files, facts)
