"""``images:letters``: printed letters, A to Z and a to z, drawn from the fonts that matplotlib brings, 8 x 8 grey pixels.

For bases that shall have seen characters and no digits. Each is drawn large, bent, inked in 32 x 32 cells and counted in fields
of 4 x 4, as the digits of ``images:digits`` were. The seed is fixed, so that all runs draw the same.
"""

from __future__ import annotations

import string
from functools import cache as once
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from trace_dist.data.images.digits import image_set
from trace_dist.data.pictures import png_of

PER_LETTER = {"train": 96, "test": 8}
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono",
    "STIXGeneral", "STIXGeneralItalic", "cmtt10", "cmss10",
)  # fmt: skip
_DRAWN, _CELLS, _FIELD = 80, 32, 4
_INKED = 110
"""Grey value from which on a cell is inked."""


@once
def splits() -> dict[str, datasets.Dataset]:
    """4,992 images to train and 416 to test on, as PNG files, with their letters."""
    import matplotlib  # needed for this set alone
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), _DRAWN // 2) for name in FONTS]
    random, found = np.random.default_rng(0), {}
    for split, count in PER_LETTER.items():
        letters = [letter for letter in string.ascii_letters for _ in range(count)]
        files = [png_of(_letter(letter, fonts, random)) for letter in letters]
        labels = [string.ascii_letters.index(letter) for letter in letters]
        found[split] = image_set(files, labels, list(string.ascii_letters))
    return found


def _letter(letter: str, fonts: list[Any], random: np.random.Generator) -> np.ndarray:
    """[8, 8] uint8: a letter in a font of its own, turned, slanted, stretched and shifted a little."""
    from PIL import Image, ImageDraw

    large, middle = Image.new("L", (_DRAWN, _DRAWN), 0), _DRAWN // 2
    font, pen = fonts[random.integers(len(fonts))], int(random.integers(3))
    ImageDraw.Draw(large).text((middle, middle), letter, fill=255, font=font, anchor="mm", stroke_width=pen)
    turn, slant, wide, high, stretch = random.normal(0, (0.12, 0.2, 0.15, 0.1, 0.15))
    bend = np.array([
        [np.cos(turn) * np.exp(wide), slant - np.sin(turn)],
        [np.sin(turn), np.cos(turn) * np.exp(high)],
    ])  # fmt: skip
    shift = middle - bend @ np.full(2, middle)
    rows = [(*row, moved) for row, moved in zip(bend.tolist(), shift.tolist(), strict=True)]
    bent = large.transform(
        large.size, Image.Transform.AFFINE, (*rows[0], *rows[1]), Image.Resampling.BILINEAR
    )
    inked = bent.point(lambda value: 255 * (value >= _INKED))
    left, top, right, bottom = inked.getbbox() or (0, 0, _DRAWN, _DRAWN)
    width = int(np.clip(_CELLS * (right - left) / (bottom - top) * np.exp(stretch), 6, _CELLS))
    scaled = bent.crop((left, top, right, bottom)).resize((width, _CELLS), Image.Resampling.BILINEAR)
    whole = Image.new("L", (_CELLS, _CELLS), 0)
    whole.paste(scaled, ((_CELLS - width) // 2 + int(random.integers(-2, 3)), 0))
    fields = (np.asarray(whole) >= _INKED).reshape(_CELLS // _FIELD, _FIELD, -1, _FIELD).sum(axis=(1, 3))
    return np.round(fields * (255 / _FIELD**2)).astype(np.uint8)
