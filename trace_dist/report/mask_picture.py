"""A picture of one mask: its density by layer and role."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_dist.report import plots
from trace_dist.report.results import MaskView, matrix
from trace_dist.report.theme import LIGHT, new_figure, theme
from trace_dist.utils.files import atomic_path

FORMATS = (".png", ".svg")
SIZE_PX = (480, 420)
_DPI = 144


def check_picture(path: Path) -> None:
    """Raise ValueError unless a picture can have this name."""
    if path.suffix not in FORMATS:
        raise ValueError(f"picture={str(path)!r}: must end in {' or '.join(FORMATS)}; rename it")


def mask_picture(heat: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw a mask.

    Args:
        heat: ``roles`` and ``density`` (layers by roles), as in results.json.
        title: what stands above it.
        path: a PNG or SVG file to write.

    Raises:
        ValueError: another kind of file, or no tensor lies in a layer.
    """
    check_picture(path)
    roles, rows = list(heat["roles"]), list(heat["density"])
    if not roles:
        raise ValueError(
            f"picture={str(path)!r}: no maskable tensor lies in a layer, so there is nothing to draw"
        )
    view = MaskView(roles, matrix(rows, len(rows), len(roles), "mask"))
    with theme():
        fig = new_figure(*SIZE_PX)
        plots.draw_mask_row(fig, {title: view}, plots.mask_ceiling([view]))
        with atomic_path(path) as temporary:
            fig.savefig(temporary, format=path.suffix[1:], dpi=_DPI, facecolor=LIGHT["card"])
