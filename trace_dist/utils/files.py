"""Files that are whole or absent: every write goes to a temporary name, is flushed, and is renamed.

Tensors are stored as safetensors with a JSON header (never pickle).
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch


MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What Python, torch and safetensors raise where a file holds another type, size or shape than it should."""

SILENT_SECONDS = 60.0
"""A temporary file that was not written for so long, and whose process is not there, is what a killed one has left."""
HASHED_BYTES = 2**24
"""Read and hashed at a time."""


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Where something is written.

    Args:
        what: begins the message: a path, or ``field=value``.

    Raises:
        ValueError: it cannot be written: no permission, no space, a folder in its place.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{what}: cannot be written ({reason}); check permissions and free space, or choose another folder"
        ) from error


def check_writable(path: Path | str | None, field: str) -> None:
    """Raise ValueError where a file cannot be written; asked before the work whose result it takes. None is no file."""
    if path is None:
        return
    path, what = Path(path), f"{field}={str(path)!r}"
    if path.is_dir():
        raise ValueError(f"{what}: is a folder; name a file")
    with writing(what):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def check_apart(out: Path, others: Mapping[str, Path], field: str = "out") -> None:
    """Raise ValueError where a folder that is to be written, and one of others, are the same or one lies in the other.

    Args:
        out: the folder.
        others: what each is, such as ``the base model`` -> where it lies.
        field: begins the message.
    """
    place = out.resolve()
    for what, folder in others.items():
        other = folder.resolve()
        if place == other or other in place.parents or place in other.parents:
            how = "is" if place == other else "lies in" if other in place.parents else "holds"
            raise ValueError(
                f"{field}={str(out)!r}: {how} the folder of {what} ({folder}); choose a folder of its own"
            )


def check_folder(path: Path) -> None:
    """Raise ValueError where a folder cannot be made or filled; asked before the work whose result it takes."""
    existing = path if path.exists() else path.parent
    with writing(path):
        existing.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=existing):
            pass


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; renames it to ``path`` when the block succeeds.

    Raises:
        ValueError: as ``writing``.
    """
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned_files(path.parent.resolve())
            yield temporary
            _flush_file(temporary)
            temporary.replace(path)
            flush_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _host() -> str:
    """Names this host in the names of temporary files: process ids are those of one host."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


@cache
def _remove_abandoned_files(folder: Path) -> None:
    """Remove, once in this process, the temporary files of processes of this host that were killed. A process of another
    container of the same name is not seen, but it writes."""
    own = re.compile(rf"\..+\.{_host()}-(\d+)\.tmp")
    # Another process may remove the same ones.
    with suppress(OSError):
        for left in folder.iterdir():
            found = own.fullmatch(left.name)
            if found and not psutil.pid_exists(int(found[1])):
                with suppress(OSError):
                    if left.is_file() and time.time() - left.stat().st_mtime > SILENT_SECONDS:
                        left.unlink()


def flush_folder(folder: Path) -> None:
    """Make what was renamed in a folder survive a loss of power, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``; renames it to ``path`` when the block succeeds.

    Raises:
        ValueError: ``path`` exists already, or as ``writing``.
    """
    if path.exists():
        raise ValueError(f"{path}: exists already; delete it or choose another folder")
    with _temporary_folder(path, path.parent) as temporary:
        yield temporary
        _flush_files(temporary)
        temporary.rename(path)
        flush_folder(path.parent)


@contextmanager
def filled_folder(path: Path, replaced: Collection[str] = ()) -> Iterator[Path]:
    """As ``atomic_folder``; where ``path`` exists, the new files take their places in it one by one, once all are written.

    Args:
        path: the folder.
        replaced: files in it, by their paths from there, that go then, unless there is a new one.

    Raises:
        ValueError: as ``writing``.
    """
    if not path.exists():
        with atomic_folder(path) as temporary:
            yield temporary
        return
    # In it: the folder beside may be of another disk, or of somebody else.
    with _temporary_folder(path, path) as temporary:
        yield temporary
        new = _flush_files(temporary)
        for name in set(replaced) - {file.relative_to(temporary).as_posix() for file in new}:
            (path / name).unlink(missing_ok=True)
        for file in new:
            place = path / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        flush_folder(path)


@contextmanager
def _temporary_folder(path: Path, parent: Path) -> Iterator[Path]:
    """An empty temporary folder for ``path`` in ``parent``, gone after the block."""
    # What stands for the folder, as ``.`` does, may have no name.
    begin = f".{path.resolve().name}.{_host()}-"
    temporary = parent.resolve() / f"{begin}{os.getpid()}.tmp"
    _remove_abandoned(parent.resolve(), begin)
    # Left by a killed process that had the same id.
    shutil.rmtree(temporary, ignore_errors=True)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        with writing(path):
            temporary.mkdir(parents=True)
            # Where a file system has no locks, abandoned folders stay.
            with suppress(OSError):
                stack.enter_context(_locked(temporary))
            yield temporary


def _remove_abandoned(parent: Path, begin: str) -> None:
    """Remove temporary folders of processes of this host that were killed: of a model they hold all its weights."""
    for left in parent.glob(f"{glob.escape(begin)}*.tmp"):
        number = left.name.removeprefix(begin).removesuffix(".tmp")
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            # Held by a process that is seen from another container alone.
            with suppress(OSError), _locked(left):
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; OSError where another process does, or where there are no locks."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _flush_files(folder: Path) -> list[Path]:
    """Flush the files of a folder to the disk; lists them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _flush_file(file)
    return files


def _flush_file(file: Path) -> None:
    """Flush a new file to the disk, with the permissions that the umask leaves: safetensors leaves none to others."""
    with file.open("rb") as handle:
        if not os.fstat(handle.fileno()).st_mode & 0o077:
            with suppress(OSError):  # some network file systems
                os.fchmod(handle.fileno(), 0o666 & ~_umask())
        os.fsync(handle.fileno())


def _umask() -> int:
    """The umask of this process; the call that tells it changes it, which other threads would see."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; run the command that writes it first, or fix the path"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); fix the path or its permissions"
        ) from None
    # The bytes are no text, a number is too long, or all is nested too deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); restore the file or delete it and run again"
        ) from None


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record to a JSON-lines file. Raises ValueError as ``writing``."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError when the disk under ``folder`` cannot take ``num_bytes`` more."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise ValueError(
            f"{folder}: {num_bytes / 2**20:.1f} MiB are needed but {free / 2**20:.1f} MiB are free; "
            "free some disk space or choose another folder"
        )


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to one safetensors file, atomically.

    Raises:
        ValueError: the disk has no room.
    """
    # Loads torch, which the command line can do without.
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()) + 2**20)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"header": json.dumps(dict(header))})


@contextmanager
def readable(path: Path, kind: str, cure: str = "check the path") -> Iterator[None]:
    """Where a file is read, which another process may remove meanwhile.

    Args:
        path: the file.
        kind: what it should be.
        cure: what to do where there is none.

    Raises:
        ValueError: it is missing, or the system does not let it be read.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such {kind} file; {cure}")
        # Some who read it, safetensors for one, call whatever the system refuses a missing file.
        path.open("rb").close()
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: the {kind} file cannot be read ({error.strerror or error}); fix its permissions, or restore it from a copy"
        ) from None


def check_readable(path: Path, kind: str) -> None:
    """Raise ValueError as ``readable`` does, before work that needs the file."""
    with readable(path, kind):
        pass


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Any]:
    with readable(path, kind):
        try:
            with safe_open(str(path), framework="pt") as handle:
                yield handle
        # A type or a size that torch does not have, beside what safetensors finds.
        except (SafetensorError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise corrupt(path, kind, error) from None


def corrupt(path: Path, kind: str, reason: object) -> ValueError:
    """The error of a damaged file."""
    return ValueError(f"{path}: corrupt {kind} file ({reason}); restore it from a copy or make it again")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Where values are taken out of a file, whose types, sizes and shapes may be any.

    Raises:
        ValueError: one of ``MALFORMED`` was raised, or there is no memory for what the file says.
    """
    try:
        yield
    except (*MALFORMED, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise corrupt(
            path, kind, reason if isinstance(error, ValueError) else f"{type(error).__name__}: {reason}"
        ) from None


def _header(handle: Any, path: Path, kind: str) -> dict[str, Any]:
    try:
        header = json.loads((handle.metadata() or {}).get("header", "{}"))
    except (ValueError, RecursionError) as error:
        raise corrupt(path, kind, error) from None
    found = header.get("format") if isinstance(header, dict) else None
    if found != f"trace_dist.{kind}":
        raise ValueError(
            f"{path}: format is {found!r}, not 'trace_dist.{kind}'; this is not a {kind} file: give the right one"
        )
    return header


def load_tensors(
    path: Path, kind: str, wanted: Callable[[str], bool] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file that ``save_tensors`` wrote.

    Args:
        path: the file.
        kind: what the file should be; its header must say ``format: trace_dist.<kind>``.
        wanted: whether to read the tensor of this name; all are read when not given.

    Raises:
        ValueError: missing, corrupt, or of another kind.
    """
    with _opened(path, kind) as handle:
        header = _header(handle, path, kind)
        names = [name for name in handle.keys() if wanted is None or wanted(name)]  # noqa: SIM118
        return {name: handle.get_tensor(name) for name in names}, header


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        # Large parts: between two of them another thread that computes may keep this one waiting.
        part = memoryview(bytearray(min(os.fstat(handle.fileno()).st_size + 1, HASHED_BYTES)))
        while size := handle.readinto(part):
            digest.update(part[:size])
    return digest.hexdigest()
