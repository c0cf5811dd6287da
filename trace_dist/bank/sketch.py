"""A task's update of the proxy in little, kept so that later tasks can be compared with it when its data are gone.

[Note: sketches] CountSketch (Charikar, Chen, Farach-Colton 2002): entry i of a tensor is added, with the sign s(i), to bucket
h(i) of B; h and s are hash functions of the seed, the tensor's name and i. The inner product of two sketches made with the
same functions is an unbiased estimate of that of the updates x and y, with

    variance  <=  (|x|^2 |y|^2 + <x, y>^2) / B.

The cosine of two sketches estimates the cosine c of the updates with a standard deviation of about (1 - c^2) / sqrt(B) at
most: 0.03 for B = 1024 and updates that have nothing in common, 0 for parallel ones, and less where a few entries dominate.
Over the whole model the tensors' errors are independent and partly cancel. A tensor of at most B elements is kept as it is:
no error. One row of buckets, not several with a median of their products: a median is not unbiased, and rows could not be
added over tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trace_dist.masks.ops import tensor_seed
from trace_dist.models.fingerprint import same_model
from trace_dist.utils.files import reading
from trace_dist.utils.mixing import mix, shift
from trace_dist.utils.sealed import check_version, load_sealed, save_sealed

VERSION = 1
NUM_BUCKETS = 1024
CHUNK = 1 << 20
"""Elements hashed at a time; each takes some 40 bytes meanwhile."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """A sketched update.

    Attributes:
        values: parameter -> [min(numel, num_buckets)] fp32.
        numels: parameter -> elements of the update.
        seed: of the hash functions; only sketches of one seed can be compared.
        model: fingerprint of the proxy, where it is known.
        num_buckets: B.
    """

    values: Mapping[str, Tensor]
    numels: Mapping[str, int]
    seed: int
    model: str | None = None
    num_buckets: int = NUM_BUCKETS

    def save(self, path: Path) -> None:
        """Write the sketch file."""
        header = {
            "format": "trace_dist.sketch",
            "version": VERSION,
            "seed": self.seed,
            "model": self.model,
            "num_buckets": self.num_buckets,
            "numels": dict(self.numels),
        }
        save_sealed(path, self.values, header)

    @staticmethod
    def load(path: Path, digest: str | None = None) -> Sketch:
        """Read a sketch file.

        Args:
            path: the file.
            digest: SHA-256 of the file, where it is known.

        Raises:
            ValueError: missing, corrupt, of another kind, or of a newer version.
        """
        values, header = load_sealed(path, "sketch", digest)
        check_version(header.get("version"), path, VERSION)
        with reading(path, "sketch"):
            sketch = Sketch(values, header["numels"], header["seed"], header["model"], header["num_buckets"])
            sketch.check()
        return sketch

    def check(self) -> None:
        """Raise ValueError where the parts do not belong together."""
        numbers = (self.seed, self.num_buckets, *self.numels.values())
        if any(type(number) is not int for number in numbers) or not isinstance(self.model, str | None):
            raise ValueError("its header holds no whole numbers")
        wanted = {name: (min(numel, self.num_buckets),) for name, numel in self.numels.items()}
        if {name: tuple(values.shape) for name, values in self.values.items()} != wanted:
            raise ValueError("its values are not of the sizes that its header says")
        if not all(values.is_floating_point() and values.isfinite().all() for values in self.values.values()):
            raise ValueError("its values are no finite numbers")


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines between a new task's update and those of earlier tasks."""

    total: Tensor
    """[T] fp64, over the whole model."""
    tensors: Mapping[str, Tensor]
    """Parameter -> [T] fp64, in that tensor alone; 0 where an update is zero."""


def sketch_update(
    update: Mapping[str, Tensor], seed: int, model: str | None = None, num_buckets: int = NUM_BUCKETS
) -> Sketch:
    """Sketch an update ([Note: sketches]).

    Args:
        update: parameter -> weight after minus weight before, any shape and float dtype.
        seed: of the hash functions, the same for all tasks of a bank.
        model: fingerprint of the proxy.
        num_buckets: B.

    Raises:
        ValueError: a value is not finite.
    """
    values = {}
    for name, change in update.items():
        flat = change.detach().reshape(-1)
        if not bool(flat.isfinite().all()):
            raise ValueError(f"update of {name!r}: NaN or infinite; the probe diverged: lower probe.lr")
        small = len(flat) <= num_buckets
        summed = flat.double().cpu() if small else _buckets(flat, tensor_seed(seed, name), num_buckets)
        values[name] = summed.float()
    return Sketch(values, {name: change.numel() for name, change in update.items()}, seed, model, num_buckets)


def _buckets(flat: Tensor, key: int, num_buckets: int) -> Tensor:
    """Signed sums of a flat tensor's elements: [num_buckets] fp64 on the CPU."""
    total = torch.zeros(num_buckets, dtype=torch.float64)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK].double().cpu()
        mixed = mix(torch.arange(start, start + len(part)), key)
        # the upper 31 bits choose the bucket, the lowest one the sign
        bucket = (shift(mixed, 33) * num_buckets) >> 31
        sign = 1 - 2 * (mixed & 1)
        total += torch.bincount(bucket, weights=part * sign, minlength=num_buckets)
    return total


def cosines(new: Sketch, earlier: Sequence[Sketch]) -> Cosines:
    """Cosines between a task's update and earlier ones, per tensor and over the model; errors as in [Note: sketches].

    Raises:
        ValueError: the sketches are of different proxies, seeds, sizes or parameters.
    """
    for other in earlier:
        _check_comparable(new, other)
    total = torch.zeros(3, len(earlier), dtype=torch.float64)
    tensors = {}
    for name, mine in new.values.items():
        theirs = (
            torch.stack([other.values[name].double() for other in earlier]) if earlier else mine[None][:0]
        )
        products = torch.stack(
            [
                theirs.double() @ mine.double(),
                theirs.double().square().sum(1),
                mine.double().square().sum().expand(len(earlier)),
            ]
        )
        total += products
        tensors[name] = _cosine(products)
    return Cosines(_cosine(total), tensors)


def _cosine(products: Tensor) -> Tensor:
    """<x, y>, |y|^2 and |x|^2 as [3, T] -> cosines [T]."""
    inner, theirs, mine = products
    return (inner / (theirs * mine).sqrt().clamp_min(1e-300)).clamp(-1, 1)


def _check_comparable(new: Sketch, other: Sketch) -> None:
    if new.model is not None and other.model is not None and not same_model(new.model, other.model):
        raise ValueError(
            f"sketch: of the proxy {new.model}, the earlier one of {other.model}; probe with the proxy of the earlier tasks"
        )
    if (new.seed, new.num_buckets) != (other.seed, other.num_buckets):
        raise ValueError(
            f"sketch: seed {new.seed} and {new.num_buckets} buckets, the earlier one {other.seed} and {other.num_buckets}; "
            "sketch with the same"
        )
    if dict(new.numels) != dict(other.numels):
        raise ValueError(
            "sketch: of other parameters than the earlier one; probe with the mask.maskable of the earlier tasks"
        )
