"""The pictures beside a report, as PNG: curves of what was logged, and profiles in a plane."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clue_dist.inference.report.panels import Panel
from clue_dist.inference.report.profiles import UNKNOWN

MOST_LEGEND = 36  # names in a legend; the cells of other groups are grey
_ROWS_OF_LEGEND = 18
_LONGEST_NAME = 26
PALETTE = [
    "#3b6fb6", "#e07b39", "#3a9e6f", "#c44e6c", "#8a63b0", "#b8a038", "#4bb0c6", "#8c6d54",
    "#e58fb8", "#7d8790", "#1f3f77", "#f4b183", "#8fd1a8", "#7a1f3d", "#c3a6e0", "#5f5a1e",
    "#a6dbe8", "#3f2a1d", "#f7c6de", "#d62f2f",
]  # fmt: skip
_GREY, _INK = "#cfd3d8", "#2b2f36"
_STYLE = {
    "font.family": "sans-serif",
    "text.parse_math": False,  # names of batches and cell types may have $ in them
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#9aa0a8",
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": "#60666e",
    "ytick.color": "#60666e",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def draw_panels(panels: Sequence[Panel]) -> Figure:
    """Draw panels of curves against the step, three in a row."""
    n_columns = min(3, max(1, len(panels)))
    n_rows = max(1, math.ceil(len(panels) / n_columns))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * n_columns, 2.4 * n_rows), layout="constrained")
        axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        for panel, place in zip(panels, axes, strict=False):
            _draw_panel(place, panel)
        for place in axes[len(panels) :]:
            place.set_visible(False)
        for place in axes[max(0, len(panels) - n_columns) : len(panels)]:
            place.set_xlabel("step")
    return figure


def draw_scatter(points: np.ndarray, names: np.ndarray, title: str) -> Figure:
    """Draw points coloured by name, with a legend on the right.

    Args:
        points: (n, 2).
        names: (n,), the group of each point.
        title: above the picture.
    """
    groups = group_legend(names)
    colours = dict(zip(groups, choose_colours(len(groups)), strict=True))
    shade = np.array([colours.get(name, _GREY) for name in names], dtype=object)
    # A random order, so that no group hides another; grey points lie below all others.
    depth = np.isin(names, groups) * 1.0 + np.random.default_rng(0).random(len(names))
    order = np.argsort(depth)
    n_columns = max(1, math.ceil(len(groups) / _ROWS_OF_LEGEND))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.3 + 1.5 * n_columns, 4.3), layout="constrained")
        panel = figure.subplots()
        size = float(np.clip(16000 / max(len(points), 1), 1.6, 12.0))
        x, y = points[order].T
        panel.scatter(x, y, s=size, c=list(shade[order]), alpha=0.75, linewidths=0)
        panel.set(xticks=[], yticks=[], title=title)
        panel.spines[:].set_visible(False)
        panel.set_box_aspect(1)
        rest = [name_rest(names, groups)] if len(set(names)) > len(groups) else []
        entries = [*groups, *rest]
        dots = [
            panel.scatter([], [], s=26, color=colours.get(entry, _GREY), linewidths=0)
            for entry in entries
        ]
        figure.legend(
            dots,
            [_shorten_name(entry) for entry in entries],
            loc="outside right upper",
            ncols=n_columns,
            fontsize=8,
            handletextpad=0.2,
        )
    return figure


def group_legend(names: np.ndarray) -> list[str]:
    """The names that get a colour: the largest groups, sorted. UNKNOWN never does."""
    counts = pd.Series(names[names != UNKNOWN]).value_counts()
    return sorted(map(str, counts.index[:MOST_LEGEND]), key=_split_numbers)


def choose_colours(n: int) -> list[str]:
    """Choose n colours that can be told apart.

    They come from a fixed list; beyond it they are hues a golden angle apart in three shades.
    """
    if n <= len(PALETTE):
        return PALETTE[:n]
    hsv = [((i * 0.618034) % 1, (0.75, 0.5, 0.9)[i % 3], (0.8, 0.9, 0.55)[i % 3]) for i in range(n)]
    return [matplotlib.colors.to_hex(hsv_to_rgb(colour)) for colour in hsv]


def render_png(figure: Figure) -> bytes:
    """A figure as PNG; equal data give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw_panel(place: Axes, panel: Panel) -> None:
    """Draw the curves of a panel, with a legend where they have names."""
    place.set_title(panel.title)
    place.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    place.yaxis.set_major_locator(MaxNLocator(4))
    place.grid(axis="y", color="#eceef1", linewidth=0.8)
    place.set_axisbelow(True)
    if panel.reference is not None:
        place.axhline(panel.reference, color="#9aa0a8", lw=0.8, ls=":")
    for curve, colour in zip(panel.curves, choose_colours(len(panel.curves)), strict=True):
        place.plot(curve.steps, curve.values, lw=1.3, color=colour, label=curve.name)
    place.set_ylim(panel.low, panel.high)
    if len(panel.curves) > 1 or panel.curves[0].name:
        handles = place.get_lines()[-len(panel.curves) :]
        place.legend(handles, [curve.name for curve in panel.curves], fontsize=7)


def _split_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts `type-2` before `type-10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def name_rest(names: np.ndarray, groups: Sequence[str]) -> str:
    """What a legend calls the grey points."""
    others = len(set(names) - set(groups) - {UNKNOWN})
    return f"{others} others" if others else UNKNOWN


def _shorten_name(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
