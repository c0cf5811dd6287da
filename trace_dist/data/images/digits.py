"""``images:digits``: scikit-learn's handwritten digits, 1,797 grey images of 8 x 8 pixels in 10 classes.

They are the test part of the UCI set "Optical Recognition of Handwritten Digits" (CC BY 4.0). Each third image is a test image,
so that both parts have digits of every writer.
"""

from __future__ import annotations

from functools import cache as once

import datasets
import numpy as np

from trace_dist.data.pictures import png_of

_TEST_ONE_IN = 3
_WHITE = 16
"""The largest value of a pixel: the number of inked cells among 4 x 4."""


@once
def splits() -> dict[str, datasets.Dataset]:
    """1,198 images to train and 599 to test on, as PNG files, with their classes 0 to 9."""
    from sklearn.datasets import load_digits  # needed for this set alone

    found = load_digits()
    pixels = np.round(found.images * (255 / _WHITE)).astype(np.uint8)
    tested = np.arange(len(pixels)) % _TEST_ONE_IN == _TEST_ONE_IN - 1
    names = [str(digit) for digit in range(10)]
    return {
        split: image_set([png_of(image) for image in pixels[rows]], found.target[rows].tolist(), names)
        for split, rows in (("train", ~tested), ("test", tested))
    }


def image_set(files: list[bytes], labels: list[int], names: list[str]) -> datasets.Dataset:
    """A dataset with the columns ``image`` and ``label``.

    Args:
        files: the bytes of each image file.
        labels: the class of each image.
        names: of the classes.
    """
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    images = [{"bytes": raw, "path": None} for raw in files]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
