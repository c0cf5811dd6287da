"""One palette for the page (light and dark) and for matplotlib, and figures as inline SVG.

Hues follow Okabe and Ito ("Color universal design", 2008), deepened until text in them is legible. A figure is drawn
once, in the light palette; `to_svg` then replaces each palette colour by its CSS variable, so that one SVG follows the
reader's colour scheme. Text stays text: searchable, in the page's font.

[Note: tints] A cell of a heat-map mixes the heat colour into the surface: 4 to 60 % of it below STRONG_TINT, under text in
ink, and 77 to 100 % from there on, under text in the surface's colour. No text is legible on what lies between.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure

# Every value is unique: `to_svg` finds the role of a colour by its value. Each hue is legible as text on the surfaces of its
# scheme (4.5:1), and the hues stay apart for the colour-blind; a test measures both.
LIGHT = {
    "page": "#f6f7f9",
    "card": "#fefefe",
    "ink": "#1b2130",
    "muted": "#545d6b",
    "rule": "#dde1e8",
    "blue": "#1a43b0",
    "sky": "#0676b0",
    "vermillion": "#b94700",
    "pink": "#96208a",
    "grey": "#434b59",
    "green": "#087252",
    "amber": "#5f3c00",
    "heat": "#0a4f94",
}
DARK = {
    "page": "#0f1319",
    "card": "#181d26",
    "ink": "#e8ebf0",
    "muted": "#a3adbb",
    "rule": "#303846",
    "blue": "#4596ff",
    "sky": "#6cc8ff",
    "vermillion": "#f5622c",
    "pink": "#f392c2",
    "grey": "#c6d2de",
    "green": "#52a078",
    "amber": "#e4c463",
    "heat": "#4ba3e3",
}
STRONG_TINT = 0.75
"""From this share of the full tint on, text stands on it in the colour of the surface ([Note: tints])."""
CATEGORY_COLORS = {
    "weights": "grey",
    "master": "blue",
    "exp_avg": "sky",
    "exp_avg_sq": "green",
    "gradients": "amber",
    "indices": "vermillion",
}
_CSS_COLORS = {value: f"var(--{role})" for role, value in LIGHT.items()}
_SPARE_COLORS = ("green", "amber", "pink", "vermillion", "sky")

_RC: dict[Any, Any] = {
    "font.size": 12,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a task may be called "$x$"
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 11,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
}


@contextmanager
def theme() -> Iterator[None]:
    """matplotlib settings of the report; the caller's are restored on exit."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc must not leak into the page
        mpl.rcParams.update(_RC)
        yield


def method_color(colour: str, position: int = 0) -> str:
    """Palette colour of a method that asks for `colour`; a spare one by `position` where the palette has no such colour."""
    return LIGHT[colour if colour in LIGHT else _SPARE_COLORS[position % len(_SPARE_COLORS)]]


def category_color(name: str) -> str:
    """Palette colour of a memory category; one that we do not know is pink."""
    return LIGHT[CATEGORY_COLORS.get(name, "pink")]


def mixed(tint: float) -> float:
    """Share of the heat colour in a cell, in [0, 1], for a tint in [0, 1]; see [Note: tints]."""
    return 0.04 + 0.74 * tint if tint < STRONG_TINT else 0.77 + 0.92 * (tint - STRONG_TINT)


def heat_map(under_text: bool) -> Colormap:
    """Sequential ramp as one hue of growing opacity: it reads on a light and on a dark surface.

    Args:
        under_text: cells carry numbers, so the ramp leaves out what no text is legible on; otherwise it is even.
    """
    red, green, blue, _ = to_rgba(LIGHT["heat"])
    shares = np.arange(256) / 256  # where the colour of each begins
    opacity = [mixed(share) if under_text else 0.04 + 0.96 * share for share in shares]
    ramp = ListedColormap([(red, green, blue, alpha) for alpha in opacity])
    return ramp.with_extremes(bad=(0.5, 0.5, 0.5, 0.2))


def css_color(color: str) -> str:
    """The CSS variable of a palette colour: `var(--blue)`."""
    return _CSS_COLORS[color]


def new_figure(width_px: int, height_px: int) -> Figure:
    """A figure whose unit is the CSS pixel: font size 12 is 12 px at natural size."""
    return Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained")


def to_svg(fig: Figure, title: str) -> str:
    """Inline SVG of `fig`, scalable, in CSS variables, with `title` for screen readers.

    The result is markup: everything in it that came from the user has been escaped.
    """
    buffer = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.hashsalt": title}):  # ids must be stable, and unique on the page
        fig.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda match: _CSS_COLORS.get(match[0], match[0]), body)
    width, height = (round(72 * inches) for inches in fig.get_size_inches())
    attributes = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}"'
    return f'<svg {attributes} style="--width: {width}px">{body}'
