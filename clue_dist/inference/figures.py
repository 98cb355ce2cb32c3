"""The figures of a report: curves of what was logged, and profiles in two dimensions."""

from __future__ import annotations

import importlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clue_dist.inference.profiles import UNKNOWN
from clue_dist.store.kernel_cache import retry_with_cache

MOST_LEGEND = 36  # names in a legend; the cells of other groups are grey
MOST_CURVES = 30
_ROWS_OF_LEGEND = 18
_LONGEST_NAME = 26
_PALETTE = [
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
# What is logged, in the order of the panels; other numbers that vary come behind.
_TITLES = {
    "loss": "loss",
    "self": "minus ELBO self (eq. 13)",
    "cross": "minus ELBO cross (eq. 14)",
    "mse": "MSE of paired z (eq. 9)",
    "contrastive": "InfoNCE of pairs",
    "d": "discriminator (eq. 12)",
    "foscttm": "FOSCTTM",
    "mixing": "mixing",
    "islands": "worst island of the joint z",
    "accuracy": "label accuracy of the joint z",
    "score": "score",
    "lr": "learning rate",
    "cells_per_s": "cells per second",
    "data_wait": "share of time waiting for data",
}
# Numbers that tell of another step than that of their line; "best" is of earlier versions.
_NOT_CURVES = {
    "step", "epoch", "best", "best_step", "best_score", "lowest_score", "lowest_step", "error",
}  # fmt: skip


def draw_curves(metrics: pd.DataFrame) -> Figure:
    """Draw every number that was logged against the step.

    Args:
        metrics: as `read_metrics` gives it.

    Returns:
        A panel for each number, training as a smoothed line, validation as dots.
    """
    names = list_curves(metrics)
    n_columns = min(3, max(1, len(names)))
    n_rows = max(1, math.ceil(len(names) / n_columns))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * n_columns, 2.4 * n_rows), layout="constrained")
        panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for panel, name in zip(panels, names, strict=False):
            for split, colour in (("train", _PALETTE[0]), ("validation", _PALETTE[1])):
                part = metrics.loc[metrics["split"] == split, ["step", name]].dropna()
                steps, values = part["step"].to_numpy(), part[name].to_numpy(float)
                handles |= _draw_line(panel, steps, values, split, colour)
            _label_panel(panel, name)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(names) - n_columns) : len(names)]:
            panel.set_xlabel("step")
        if len(handles) > 1:
            place = "outside upper right"
            figure.legend(handles.values(), handles.keys(), loc=place, ncols=2, fontsize=8)
    return figure


def list_curves(metrics: pd.DataFrame) -> list[str]:
    """List the numbers to plot: the known ones in order, then any other that varies.

    "foscttm/rna-adt" is a foscttm, and was called "foscttm rna-adt" by earlier versions.
    """
    numeric = [
        str(column)
        for column in metrics.select_dtypes("number")
        if column not in _NOT_CURVES and metrics[column].notna().any()
    ]
    quantity = {column: _split_modality(column)[0] for column in numeric}
    if "foscttm" in quantity.values():
        quantity.pop("score", None)  # the score is their mean
    order = list(_TITLES)
    known = [column for column in quantity if quantity[column] in _TITLES]
    known.sort(key=lambda column: order.index(quantity[column]))
    others = [c for c in quantity if c not in known and metrics[c].nunique() > 1]
    return (known + others)[:MOST_CURVES]


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
        rest = [_name_rest(names, groups)] if len(set(names)) > len(groups) else []
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
    if n <= len(_PALETTE):
        return _PALETTE[:n]
    hsv = [((i * 0.618034) % 1, (0.75, 0.5, 0.9)[i % 3], (0.8, 0.9, 0.55)[i % 3]) for i in range(n)]
    return [matplotlib.colors.to_hex(hsv_to_rgb(colour)) for colour in hsv]


def compute_umap(latent: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay out profiles in two dimensions, the same for the same seed.

    Args:
        latent: (n, D).
        seed: seed of the layout.

    Returns:
        (n, 2).
    """
    # It takes seconds to import, and only a report with an embedding needs it.
    umap = retry_with_cache(lambda: importlib.import_module("umap"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a seed means one thread, as is wanted
        neighbours = max(2, min(30, len(latent) - 1))
        start = "spectral" if len(latent) > 50 else "random"
        layout = umap.UMAP(n_neighbors=neighbours, min_dist=0.3, init=start, random_state=seed)
        return np.asarray(layout.fit_transform(latent))


def render_png(figure: Figure) -> bytes:
    """A figure as PNG; equal data give equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label_panel(panel: Axes, name: str) -> None:
    quantity, modality = _split_modality(name)
    title = _TITLES.get(quantity, quantity)
    panel.set_title(f"held-out {title} {modality}" if modality else title)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.grid(axis="y", color="#eceef1", linewidth=0.8)
    panel.set_axisbelow(True)


def _split_modality(name: str) -> tuple[str, str]:
    """The quantity of a name, and the modality or pair that it is of: "" where it is of all."""
    quantity, _, modality = name.replace(" ", "/").partition("/")
    return quantity, modality


def _draw_line(
    panel: Axes, steps: np.ndarray, values: np.ndarray, split: str, colour: str
) -> dict[str, Any]:
    """Draw one curve; returns what a legend shows of it, by split."""
    if not len(steps):
        return {}
    if split == "validation":
        return {split: panel.plot(steps, values, "o-", ms=2.6, lw=1.0, color=colour)[0]}
    window = max(1, len(values) // 50)
    if window > 1:
        panel.plot(steps, values, lw=0.6, color=colour, alpha=0.25)
        values = pd.Series(values).rolling(window, min_periods=1, center=True).mean().to_numpy()
    low, high = np.nanpercentile(values, [3, 97])
    lowest, highest = np.nanmin(values), np.nanmax(values)
    margin = 0.5 * (high - low)
    # The first steps of a long run would flatten the rest.
    if len(values) > 50 and highest - lowest > 3 * (high - low) > 0:
        panel.set_ylim(
            max(lowest - margin / 8, low - margin), min(highest + margin / 8, high + margin)
        )
    return {split: panel.plot(steps, values, lw=1.4, color=colour)[0]}


def _split_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts `type-2` before `type-10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _name_rest(names: np.ndarray, groups: Sequence[str]) -> str:
    """What the legend calls the grey points."""
    others = len(set(names) - set(groups) - {UNKNOWN})
    return f"{others} others" if others else UNKNOWN


def _shorten_name(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
