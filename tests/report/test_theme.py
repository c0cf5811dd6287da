"""Colours: legible as text on every surface, and apart for those who see fewer of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from trace_dist.report.theme import DARK, LIGHT, STRONG_TINT, heat_map

HUES = ("blue", "sky", "vermillion", "pink", "grey", "green", "amber")
SEEN_BY = {
    "all cones": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopes": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}
"""Matrices on linear RGB of Machado, Oliveira, Fernandes, "A physiologically-based model for simulation of color vision
deficiency" (2009), at full severity."""
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)
"""Oklab (Ottosson, 2020), in which a difference of 0.02 is just seen."""
LEAST_DIFFERENCE = 0.06


def linear(color: object) -> np.ndarray:
    values = np.array(to_rgb(color))  # type: ignore[arg-type]
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(a: object, b: object) -> float:
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def seen(color: object, matrix: np.ndarray) -> np.ndarray:
    return TO_LAB @ np.cbrt(TO_LMS @ np.clip(matrix @ linear(color), 0, 1))


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_hues_are_legible_and_stay_apart(palette: dict[str, str]) -> None:
    for hue in (*HUES, "ink", "muted"):
        for surface in ("card", "page"):
            assert contrast(palette[hue], palette[surface]) >= 4.5, (hue, surface)
    for who, matrix in SEEN_BY.items():
        for a, b in combinations(HUES, 2):
            difference = float(np.linalg.norm(seen(palette[a], matrix) - seen(palette[b], matrix)))
            assert difference >= LEAST_DIFFERENCE, (who, a, b)


def test_numbers_are_legible_on_every_cell_of_a_heat_map() -> None:
    """As the picture draws them: ink below the strong tint, the surface's colour from there on."""
    ramp, card = heat_map(under_text=True), np.array(to_rgb(LIGHT["card"]))
    for tint in np.linspace(0, 1, 101):
        *hue, alpha = ramp(float(tint))
        cell = alpha * np.array(hue) + (1 - alpha) * card
        text = LIGHT["card"] if tint >= STRONG_TINT else LIGHT["ink"]
        assert contrast(cell, text) >= 4.5, tint
    shares = [heat_map(under_text=False)(step)[3] for step in range(256)]
    assert np.allclose(np.diff(shares), np.diff(shares)[0])
