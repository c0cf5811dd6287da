"""Memory over the steps of a training, phases shaded, beside what was predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from trace_dist.report.theme import LIGHT, new_figure, theme
from trace_dist.utils.files import atomic_path

MIB = 2**20
PHASE_COLORS = {"forward": "blue", "backward": "vermillion", "step": "green"}


def draw_timeline(result: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG of a result of ``profiling.profile.run_profile``; returns its path."""
    with theme():
        figure = new_figure(920, 400)
        figure.set_facecolor(LIGHT["card"])
        _draw(figure.subplots(), result)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=160)
    return path


def _draw(ax: Axes, result: Mapping[str, Any]) -> None:
    timeline, estimate = result["timeline"], result["estimate"]
    seconds, mib = timeline["seconds"], [size / MIB for size in timeline["bytes"]]
    states, peak = sum(estimate["states"].values()) / MIB, estimate["peak"] / MIB
    top = 1.16 * max(peak, timeline["peak"] / MIB)
    end = timeline["phases"][-1][2]
    for name, begin, stop in timeline["phases"]:
        ax.axvspan(begin, stop, color=LIGHT[PHASE_COLORS[name]], alpha=0.12, linewidth=0)
    handles = [Patch(color=LIGHT[color], alpha=0.3, label=name) for name, color in PHASE_COLORS.items()]
    ax.legend(
        handles=handles, loc="upper left", ncols=len(handles), frameon=False, fontsize=11, borderaxespad=0.3
    )
    ax.fill_between(seconds, mib, color=LIGHT["grey"], alpha=0.22, linewidth=0)
    ax.plot(seconds, mib, color=LIGHT["ink"], linewidth=1.3)
    error = result["errors"]["peak"]
    labels = (
        (peak, f"predicted peak {peak:,.0f} MiB ({error:+.1%})", 4),
        (states, f"predicted states {states:,.0f} MiB", -16),
    )
    for level, text, offset in labels:
        ax.axhline(level, color=LIGHT["pink"], linewidth=1.5, linestyle=(0, (5, 3)))
        place: dict[str, Any] = {"xytext": (-6, offset), "textcoords": "offset points", "ha": "right"}
        ax.annotate(text, (end, level), color=LIGHT["pink"], fontsize=11, **place)
    ax.set(xlim=(0, end), ylim=(0, top), xlabel="seconds", ylabel="MiB on the first rank")
    ax.grid(axis="y")
    ax.set_axisbelow(True)
    setup = result["setup"]
    ranks = f"{setup['world_size']} rank" + "s" * (setup["world_size"] > 1)
    millions = estimate["num_parameters"] / 1e6
    ax.set_title(
        f"Memory of masked training: {millions:,.0f} M parameters, density {setup['density']:g}, {setup['backend']}, {ranks}"
    )
