"""One palette for the page (light and dark) and for matplotlib, and figures as inline SVG.

Hues follow Okabe and Ito ("Color universal design", 2008), which the common colour-vision deficiencies keep
apart. A figure is drawn once, in the light palette; `to_svg` then replaces each palette colour by its CSS
variable, so that one SVG follows the reader's colour scheme. Text stays text: searchable, in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure

# Every value is unique: `to_svg` finds the role of a colour by its value.
LIGHT = {
    "page": "#f6f7f9",
    "card": "#fefefe",
    "ink": "#1b2130",
    "muted": "#5c6675",
    "rule": "#dde1e8",
    "blue": "#0072b2",
    "sky": "#3a94cc",
    "vermillion": "#d55e00",
    "pink": "#b8609a",
    "grey": "#788393",
    "green": "#00916a",
    "amber": "#b57a00",
}
DARK = {
    "page": "#0f1319",
    "card": "#181d26",
    "ink": "#e8ebf0",
    "muted": "#9ba5b4",
    "rule": "#303846",
    "blue": "#4ba3e3",
    "sky": "#a3d4f5",
    "vermillion": "#ff8a50",
    "pink": "#e39ac8",
    "grey": "#8e99a9",
    "green": "#35c79a",
    "amber": "#edb73f",
}
# From this share of the full tint on, text on it is readable only in the colour of the surface.
STRONG_TINT = 0.75
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


def heat_map() -> Colormap:
    """Sequential ramp as one hue of growing opacity: it reads on a light and on a dark surface."""
    red, green, blue, _ = to_rgba(LIGHT["blue"])
    ramp = ListedColormap([(red, green, blue, 0.05 + 0.95 * step / 255) for step in range(256)])
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
