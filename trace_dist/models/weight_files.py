"""The safetensors files of a model on disk: where they are, what they hold, and parts of their tensors.

These are the checkpoints that transformers reads, not what a training run keeps to continue from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from trace_dist.models.quantised import refuse_quantised_config, refuse_quantised_tensors
from trace_dist.models.trust import is_trusted, trust
from trace_dist.utils.files import read_json, readable
from trace_dist.utils.home import from_home

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Everything a model and its tokenizer need, but no pickle, and code only of models that may run theirs.
_DOWNLOADED = ["*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def resolve(path: str | Path) -> Path:
    """Folder of a checkpoint: the local folder itself, or the local copy of a model on the Hugging Face hub.

    Raises:
        ValueError: neither a folder with a ``config.json`` nor a model that can be fetched.
    """
    folder, what = from_home(path), f"model.path={str(path)!r}"
    if folder.is_dir():
        _check_folder(folder, what)
        return folder
    if folder.suffix == ".gguf":
        raise ValueError(
            f"{what}: a GGUF file, with quantised weights; name it as model.gguf and a folder for the converted one as model.path"
        )
    if folder.is_file():
        raise ValueError(f"{what}: a file; give the folder that holds it")
    if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:
        raise ValueError(f"{what}: no such folder; fix the path or make the model first")
    try:
        trusted = is_trusted(path)
        folder = Path(
            snapshot_download(str(path), allow_patterns=_DOWNLOADED + (["*.py"] if trusted else []))
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{what}: neither a local folder nor a model that the hub delivers "
            f"({type(error).__name__}); fix the path or the id, or download the model first"
        ) from None
    if trusted:
        trust(folder)
    return folder


class WeightFiles:
    """The tensors of one checkpoint folder, read lazily. Open with ``open_weights``."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self._files = files
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str]
        # Of a folder that has both transformers reads the one file.
        if (folder / WEIGHTS).is_file():
            self._file_of = dict.fromkeys(self._handle(WEIGHTS).keys(), WEIGHTS)
        elif (folder / INDEX).is_file():
            self._file_of = _weight_map(folder / INDEX)
        else:
            raise ValueError(_no_weights(folder))

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            path = self.folder / file
            try:
                with readable(path, "weights", f"{INDEX} lists it: fetch the checkpoint again"):
                    self._handles[file] = self._files.enter_context(safe_open(str(path), framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path}: corrupt safetensors file ({error}); fetch it again") from None
        return self._handles[file]

    def _view(self, name: str) -> Any:
        handle = self._handle(self._file_of[name])
        try:
            return handle.get_slice(name)
        except SafetensorError as error:
            path = self.folder / self._file_of[name]
            raise ValueError(f"{path}: has not what {INDEX} says ({error}); fetch it again") from None

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._view(name).get_shape())

    def dtypes(self) -> dict[str, str]:
        """Types of the tensors as the headers name them, such as ``BF16``."""
        return {name: self._view(name).get_dtype() for name in self._file_of}

    def is_floating_point(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers, from the header."""
        return self._view(name).get_dtype().startswith(("F", "BF"))

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, on the CPU."""
        return self._handle(self._file_of[name]).get_tensor(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a tensor flattened in row-major order: [stop - start], on the CPU.

        Reads only the rows (of stacked matrices that it crosses: the matrices) that the interval touches.
        """
        shape = self.shape(name)
        if not 0 <= start <= stop <= math.prod(shape):
            raise AssertionError(f"[{start}, {stop}) lies outside {name} of shape {shape}")
        if start == stop:
            return torch.empty(0)
        if not shape:
            return self.tensor(name).reshape(1)
        return _read_rows(self._view(name), shape, start, stop, ())


def _read_rows(
    view: Any, shape: tuple[int, ...], start: int, stop: int, lead: tuple[int, ...]
) -> torch.Tensor:
    """The interval inside ``view[lead]``, which has ``shape``."""
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    start, stop = start - first * inner, stop - first * inner
    if first == last and len(shape) > 2:  # inside one matrix of a stack, such as one fused expert
        return _read_rows(view, shape[1:], start, stop, (*lead, first))
    rows = view[(*lead, slice(first, last + 1))]
    return rows.reshape(-1)[start:stop]


@contextmanager
def open_weights(path: str | Path) -> Iterator[WeightFiles]:
    """Open a checkpoint for reading.

    Raises:
        ValueError: no such model, no safetensors weights (pickled ones are refused), a corrupt file, or quantised weights.
    """
    folder, what = resolve(path), f"model.path={str(path)!r}"
    refuse_quantised_config(folder, what)
    with ExitStack() as stack:
        files = WeightFiles(folder, stack)
        refuse_quantised_tensors(files.dtypes(), what)
        yield files


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file in the same folder, out of a checkpoint's index."""
    found = read_json(path)
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: damaged (it maps no tensors to files); fetch the checkpoint again")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise ValueError(
                f"{path}: damaged ({name!r:.100} lies in {file!r:.100}, no file of the folder); fetch the checkpoint again"
            )
    return files


def _check_folder(folder: Path, what: str) -> None:
    """Raise ValueError unless a folder can hold a whole model."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{what}: holds a PEFT adapter; merge it into its base (merge_and_unload, save_pretrained) and give that folder"
        )
    if (folder / "config.json").is_file():
        return
    if any(folder.glob("*.gguf")):
        raise ValueError(
            f"{what}: holds GGUF files, whose weights are quantised; name one as model.gguf and another folder as model.path"
        )
    raise ValueError(f"{what}: the folder has no config.json; give a checkpoint's folder")


def _no_weights(folder: Path) -> str:
    if any(file.suffix in _PICKLE_SUFFIXES for file in folder.iterdir()):
        return (
            f"model.path={str(folder)!r}: holds pickled weights only, which can run code when read; give a "
            "safetensors copy (where you trust the file, load it with transformers and call save_pretrained)"
        )
    return f"model.path={str(folder)!r}: holds no {WEIGHTS} and no {INDEX}; give a folder with such weights"
