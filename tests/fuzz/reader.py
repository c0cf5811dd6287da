"""What a reader is to the fuzzer, and the checksums of the files that have some."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.mutate import Kind, Sign

from trace_dist.utils.sealed import json_checksum


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: for counts.
        kind: of the file.
        make: writes a whole file (and what belongs to it) into an empty folder, and says which one is damaged.
        read: reads it and uses what it read.
        sign: gives changed content the checksums that fit.
        leaves_out: whether a damaged part is left out with a warning, so that few files are refused as a whole.
    """

    name: str
    kind: Kind
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    sign: Sign | None = None
    leaves_out: bool = False


def record_signed(value: dict[str, Any]) -> dict[str, Any]:
    """A sealed JSON object."""
    rest = {key: part for key, part in value.items() if key != "checksum"}
    return {**rest, "checksum": json_checksum(rest)}


def manifest_signed(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of a checkpoint."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def tensors_signed(parts: tuple[dict[str, Any], dict[str, Any], bytes]) -> dict[str, Any]:
    """The header of a sealed tensor file, from it, the file's outer header, and the data."""
    inner, outer, data = parts
    digest = hashlib.sha256()
    try:
        for name in sorted(name for name in outer if name != "__metadata__"):
            begin, end = outer[name]["data_offsets"]
            dtype = {"F32": "float32", "I64": "int64", "I32": "int32", "U8": "uint8", "I16": "int16"}
            digest.update(f"{name} torch.{dtype.get(outer[name]['dtype'])} ".encode() + data[begin:end])
    except (KeyError, TypeError, ValueError):
        return inner
    inner = {key: value for key, value in inner.items() if key != "header_checksum"}
    inner |= {"checksum": digest.hexdigest()} if "checksum" in inner else {}
    return {**inner, "header_checksum": json_checksum(inner)}


def silently(work: Callable[[], object]) -> None:
    """Whatever is printed goes nowhere."""
    with redirect_stdout(io.StringIO()):
        work()


class Arguments(dict[str, Any]):
    """Parsed arguments."""

    __getattr__ = dict.__getitem__
