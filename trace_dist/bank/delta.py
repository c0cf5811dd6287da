"""A task as a small sparse delta: the tuned values at a mask's entries.

File: ``<param>/gaps`` ([Note: gaps] in masks/gaps.py) and ``<param>/values`` (tuned values in the model's dtype), plus a header
with the base model's fingerprint and checksums (utils/sealed.py). The mask can be read without the values. At 5 % density an
element costs 1.1 bytes of index at most; a bf16 entry 3.1 bytes, an fp32 entry 5.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trace_kernels.compact import compact_gather, compact_scatter

from trace_dist.bank import swap
from trace_dist.bank.swap import Swap
from trace_dist.masks.gaps import decode_gaps
from trace_dist.masks.header import layouts_from_header, layouts_header
from trace_dist.masks.mask import Mask
from trace_dist.models.fingerprint import same_model
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.support import value_supports
from trace_dist.utils import dist
from trace_dist.utils.files import corrupt, load_tensors, reading
from trace_dist.utils.finite import all_finite
from trace_dist.utils.sealed import check_header, load_sealed, save_sealed

VERSION = 1
GAPS = "/gaps"


@dataclass(frozen=True)
class Delta:
    """Tuned values of one task.

    Attributes:
        mask: which entries; ``mask.meta["model"]`` is the fingerprint of the base model.
        values: parameter -> [entries] tuned values in the model's dtype, in the order of the mask's entries.
        task: the task's name.

    Raises:
        ValueError: there is not exactly one value per entry of the mask.
    """

    mask: Mask
    values: Mapping[str, Tensor]
    task: str

    def __post_init__(self) -> None:
        if not isinstance(self.task, str):
            raise ValueError(f"delta {self.task!r:.100}: its task is no name; extract it again")
        found = {name: tuple(values.shape) for name, values in self.values.items()}
        wanted = {
            name: (int(self.mask.layouts[name].sizes(units).sum()),)
            for name, units in self.mask.units.items()
        }
        numbers = all(values.is_floating_point() for values in self.values.values())
        if found != wanted or not numbers:
            raise ValueError(f"delta {self.task!r}: its values do not fit its mask; extract it again")

    @property
    def nbytes(self) -> int:
        """Bytes of indices and values on disk, without the header."""
        return self.mask.units.nbytes + sum(values.nbytes for values in self.values.values())

    @property
    def dtypes(self) -> list[str]:
        """Names of the data types of its values, and that of the model where none has it."""
        found = {str(values.dtype).removeprefix("torch.") for values in self.values.values()}
        return sorted(found | ({str(self.mask.meta["dtype"])} if "dtype" in self.mask.meta else set()))

    def check_finite(self) -> None:
        """Raise ValueError where a value is infinite or NaN: no answer would come of it."""
        broken = [name for name, values in self.values.items() if not all_finite([values])]
        if broken:
            raise ValueError(
                f"delta {self.task!r}: holds infinite or NaN values ({len(broken)} of {len(self.values)} parameters, such as "
                f"{broken[0]}); train the task again with a lower learning rate"
            )

    def save(self, path: Path) -> None:
        """Write the delta file (format in docs/formats.md), whole or not at all.

        Raises:
            ValueError: a value is infinite or NaN, or it cannot be written (no space, no permission); what was there stays.
        """
        self.check_finite()
        tensors = {f"{name}{GAPS}": gaps.words for name, gaps in self.mask.units.gaps.items()}
        tensors |= {f"{name}/values": values for name, values in self.values.items()}
        header = {
            "format": "trace_dist.delta",
            "version": VERSION,
            "task": self.task,
            "digest": self.mask.digest(),
            "granularity": self.mask.granularity,
            "layouts": layouts_header(self.mask.layouts),
            "meta": dict(self.mask.meta),
        }
        save_sealed(path, tensors, header)

    @staticmethod
    def load(path: Path, digest: str | None = None) -> Delta:
        """Read a delta file.

        Args:
            path: the file.
            digest: SHA-256 of the file, where it is known.

        Raises:
            ValueError: it is missing, corrupt or not a delta.
        """
        tensors, header = load_sealed(path, "delta", digest)
        mask = _mask(tensors, header, path)
        with reading(path, "delta"):
            return Delta(mask, {name: tensors[f"{name}/values"] for name in mask}, header["task"])

    @staticmethod
    def load_mask(path: Path, digest: str | None = None) -> Mask:
        """Read the mask of a delta file alone, without its values.

        Args:
            path: the file.
            digest: of the mask (``Mask.digest``), where it is known.

        Raises:
            ValueError: as ``load``.
        """
        tensors, header = load_tensors(path, "delta", lambda name: name.endswith(GAPS))
        check_header(header, path, "delta")
        known = digest or header.get("digest")
        if known is None:
            # written by a release whose checksum covers mask and values together
            return Delta.load(path).mask
        mask = _mask(tensors, header, path)
        if not mask.has_digest(known):
            raise corrupt(path, "delta", "wrong checksum of its mask")
        return mask


def _mask(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Mask:
    """The mask in a delta file."""
    layouts = layouts_from_header(header, path)
    names = [key.removesuffix(GAPS) for key in tensors if key.endswith(GAPS)]
    with reading(path, "delta"):
        units = {name: decode_gaps(tensors[f"{name}{GAPS}"], layouts[name].index_dtype) for name in names}
        return Mask(units, layouts, str(header["granularity"]), dict(header["meta"]))


def extract_delta(model: ShardedModel, mask: Mask, task: str) -> Delta:
    """Gather the model's present values at a mask's entries, on every rank. Collective.

    Its mask says ``quantize`` where the model's linear layers are 4-bit codes, which the values were then fitted to, and
    ``dtype`` where no value has the data type of the model, as of a router alone that the family keeps in fp32.
    """
    model.check_current()
    values = {}
    for support in value_supports(model, mask):
        local, runs = model.storage(support)
        mine = compact_gather(local, runs).to(local.dtype)
        values[support.name] = dist.all_gather_uneven(mine, support.splits).cpu()
    return Delta(_learned_on(model, mask, {each.dtype for each in values.values()}), values, task)


def _learned_on(model: ShardedModel, mask: Mask, dtypes: set[torch.dtype]) -> Mask:
    """A mask that says how a model is kept, of whose values there are these data types; not what another one was."""
    meta = {key: value for key, value in mask.meta.items() if key not in ("quantize", "dtype")}
    if model.quantize != "none":
        meta["quantize"] = model.quantize
    if model.dtype not in dtypes:
        meta["dtype"] = str(model.dtype).removeprefix("torch.")
    return mask if meta == mask.meta else replace(mask, meta=meta)


@contextmanager
def applied(model: ShardedModel, delta: Delta | None) -> Iterator[None]:
    """Inside the block the model holds the delta's values; afterwards its own, bit for bit. None changes nothing. Collective.

    Raises:
        ValueError: the delta is of another model or dtype.
    """
    if delta is None:
        yield
        return
    with made_ready(model, delta).applied():
        yield


def made_ready(model: ShardedModel, delta: Delta) -> Swap:
    """A copy of a delta that can be put into a model again and again. Raises ValueError as ``applied``."""
    return Swap(model, delta.mask, delta.values, delta.task)


def check_dtype(delta: Delta, name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless a delta holds a parameter's entries in the dtype that the model has."""
    swap.check_dtype(delta.task, delta.values[name].dtype, dtype)


class Snapshot:
    """This rank's present values at a mask's entries, to be put back bit for bit later.

    Args:
        model: the model.
        mask: the entries that will change.
    """

    def __init__(self, model: ShardedModel, mask: Mask) -> None:
        model.check_current()
        self._model = model
        self._values = [
            (support, compact_gather(*model.storage(support))) for support in value_supports(model, mask)
        ]

    def restore(self) -> None:
        """Put the values back. Collective."""
        for support, values in self._values:
            compact_scatter(*self._model.storage(support), values)
        self._model.refresh([support for support, _ in self._values])
        self._model.release()


def check_base(delta_or_mask: Mask, fingerprint: str, what: str) -> None:
    """Raise ValueError unless a mask (or a delta's mask) was made for the model with this fingerprint."""
    found = delta_or_mask.meta.get("model")
    if found is not None and not same_model(str(found), fingerprint):
        raise ValueError(
            f"{what}: made for model {found}, but the model given is {fingerprint}; use the model it was made for"
        )
