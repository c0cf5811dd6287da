"""Files that notice when a bit of theirs has changed.

The header of a sealed tensor file holds ``checksum``, of the tensors, and ``header_checksum``, of the rest of the header.
A catalogue that knows the SHA-256 of the whole file may give that instead. A sealed JSON object holds ``checksum``, of the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.utils.files import (
    corrupt,
    load_tensors,
    read_json,
    readable,
    save_tensors,
    sha256,
    write_json,
)

OWN = "header_checksum"


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} ".encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_checksum(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys; empty for one so deep that nobody wrote it."""
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return ""


def save_sealed(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """As ``files.save_tensors``, with checksums."""
    save_tensors(path, tensors, sealed_header({**header, "checksum": tensors_checksum(tensors)}))


def sealed_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header with its checksum."""
    # as it will be read: JSON has no tuples
    plain = json.loads(json.dumps(dict(header)))
    return {**plain, OWN: json_checksum(plain)}


def load_sealed(
    path: Path, kind: str, digest: str | None = None, bare: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As ``files.load_tensors``, but of a file that is as it was written.

    Args:
        path: the file.
        kind: what it should be.
        digest: SHA-256 of the file, where it is known; the file's own checksums are not computed then.
        bare: earlier releases wrote files of this kind without checksums; one that has none is taken as it is.

    Raises:
        ValueError: missing, corrupt, or of another kind.
    """
    if digest is not None:
        with readable(path, kind):
            found = sha256(path)
        if found != digest:
            raise corrupt(path, kind, "its bytes are not those that were written")
    mapped, header = load_tensors(path, kind)
    # the mapped pages of a file that somebody cuts short would end this process later
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    if digest is None:
        check_header(header, path, kind)
        unsealed = bare and "checksum" not in header and OWN not in header
        if not unsealed and header.get("checksum") != tensors_checksum(tensors):
            raise corrupt(path, kind, "wrong checksum")
    return tensors, header


def check_header(header: Mapping[str, Any], path: Path, kind: str) -> None:
    """Raise ValueError when a header is not as it was written. Files of earlier releases have no checksum of it."""
    rest = {name: value for name, value in header.items() if name != OWN}
    if OWN in header and header[OWN] != json_checksum(rest):
        raise corrupt(path, kind, "wrong checksum of its header")


def check_version(version: Any, path: Path, newest: int, oldest: int | None = None) -> None:
    """Raise ValueError unless this release reads a version of a file.

    Args:
        version: what the file says.
        path: the file.
        newest: version that is written.
        oldest: the first one that is read; the newest alone when None.
    """
    first = newest if oldest is None else oldest
    if type(version) is not int or not first <= version <= newest:
        known = str(newest) if oldest is None else f"{oldest} to {newest}"
        raise ValueError(
            f"{path}: version {version!r:.100}, but this release reads {known}; update trace_dist"
        )


def same_content(one: Path, other: Path, kind: str) -> bool:
    """Whether two files hold the same tensors and header, whichever release wrote their checksums and however they call the task:
    its name is what the index of a bank says.

    Raises:
        ValueError: one of them is missing, corrupt, or of another kind.
    """
    (tensors, header), (other_tensors, other_header) = load_sealed(one, kind), load_sealed(other, kind)
    shared = (header.keys() & other_header.keys()) - {OWN, "task"}
    return tensors_checksum(tensors) == tensors_checksum(other_tensors) and all(
        header[name] == other_header[name] for name in shared
    )


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """As ``files.write_json``, of an object and with its checksum."""
    plain = json.loads(json.dumps(dict(value)))
    write_json(path, {**plain, "checksum": json_checksum(plain)})


def read_record(path: Path, cure: str, bare: bool = False) -> dict[str, Any]:
    """A JSON object as ``write_record`` was given it.

    Args:
        path: the file.
        cure: ends the message, such as ``delete it to begin anew``.
        bare: earlier releases wrote it without checksum; one that has none is taken as it is.

    Raises:
        ValueError: missing, not JSON, no object, or changed since it was written.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged (it holds no object); {cure}")
    digest = found.pop("checksum", None)
    if digest != json_checksum(found) and not (bare and digest is None):
        raise ValueError(f"{path}: damaged (wrong checksum); {cure}")
    return found
