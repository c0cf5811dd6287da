"""Images as prompts: a data URI (RFC 2397) of the file as it is stored, ``data:image/png;base64,...``.

A prompt that is an image is a text like any other to whatever splits, counts, compares and stores examples; only a modality
(``data.modality``) looks inside.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
_SCHEME, _CODED = "data:image/", ";base64,"
MOST_PIXELS = 2**26
"""Of one image: a file of some KiB can say that it has any number of them, and every one takes three bytes."""
_WITHOUT_WHITE = ("F", "I")
"""PIL's modes of numbers that say neither what is black nor what is white; PIL would cut them off at 0 and 255."""
_READABLE: set[bytes] = set()
"""Digests of stored images that this process has verified: each task of a stream of classes reads the same files, and a JPEG is
verified by decoding it."""


def stored_uri(value: Mapping[str, Any] | None, where: str) -> str | None:
    """The URI of an image as ``datasets`` stores it, ``{"bytes", "path"}``; None where there is none.

    Raises:
        ValueError: it cannot be read, as ``check_picture``; names its file, or ``where`` it comes from.
    """
    if value is None:
        return None
    raw = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    if digest not in _READABLE:
        _opened(raw, value["path"] or where, verify=True)
        _READABLE.add(digest)
    return uri_of(raw)


def uri_of(raw: bytes) -> str:
    """The URI of the bytes of an image file."""
    kind = next((kind for begin, kind in _KINDS.items() if raw.startswith(begin)), "x-unknown")
    return f"{_SCHEME}{kind}{_CODED}{base64.b64encode(raw).decode('ascii')}"


def png_of(image: Any) -> bytes:
    """The bytes of an image, a PIL one or an array [height, width] or [height, width, 3] of uint8, as a PNG file."""
    from PIL import Image  # needed for images alone

    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG")
    return file.getvalue()


def picture_of(prompt: Any) -> Any:
    """The image of a prompt: a PIL image in RGB.

    Raises:
        ValueError: the prompt is no data URI of an image, or the image cannot be read or has more than ``MOST_PIXELS``.
    """
    return _opened(_bytes_of(prompt), f"prompt {prompt[:40]!r}")


def check_picture(prompt: Any) -> None:
    """As ``picture_of``, but cheaper where it is a PNG file: its checksums are read, and no pixels decoded."""
    _opened(_bytes_of(prompt), f"prompt {prompt[:40]!r}", verify=True)


def _bytes_of(prompt: Any) -> bytes:
    if not (isinstance(prompt, str) and prompt.startswith(_SCHEME) and _CODED in prompt):
        raise ValueError(
            f"prompt {str(prompt)[:40]!r}: is no image; give a column of images (tasks.prompt_field), or set data.modality: text"
        )
    try:
        return base64.b64decode(prompt.partition(_CODED)[2], validate=True)
    except ValueError as error:
        raise _unreadable(f"prompt {prompt[:40]!r}", error) from error


def _opened(raw: bytes, where: str, verify: bool = False) -> Any:
    """The image in RGB, upright as its camera says, or only verified."""
    from PIL import Image, ImageOps  # needed for images alone

    try:
        image: Any = Image.open(io.BytesIO(raw))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
        if image.mode in _WITHOUT_WHITE:
            raise ValueError(f"its pixels, of mode {image.mode}, name no white; save it with 8 or 16 bits")
        if verify:
            # Other formats have no checksums.
            return image.verify() if image.format == "PNG" else image.load()
        # What a damaged note of the camera says is left out, as most programs do.
        with suppress(Exception):
            image = ImageOps.exif_transpose(image)
        return _eight_bits(image).convert("RGB")
    # Every format is read by code of its own, which raises what the bytes make it raise.
    except Exception as error:
        raise _unreadable(where, error) from error


def _eight_bits(image: Any) -> Any:
    """An image of 16 bits in 8; PIL's ``convert`` makes all of its values above 255 white."""
    if not image.mode.startswith("I;16"):
        return image
    from PIL import Image  # needed for images alone

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _unreadable(where: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(f"{where}: an image that cannot be read ({reason}); drop or mend it")
