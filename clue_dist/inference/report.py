"""One page about a run: how the losses went, what the embedding looks like, how well modalities match, the config.

RUN/report/index.html holds everything inside itself; the figures lie beside it as PNG files too.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib
import mudata as md
import numpy as np
import pandas as pd
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clue_dist.errors import ConfigError
from clue_dist.inference.embed import KEY
from clue_dist.matching import METRICS, SCOPES

MOST_PROFILES = 10_000
MOST_LEGEND = 36
_MOST_CURVES = 15
UNKNOWN = "unknown"
JOINT = "all observed"  # in place of a modality: z from everything observed in a cell
_PALETTE = [
    "#3b6fb6", "#e07b39", "#3a9e6f", "#c44e6c", "#8a63b0", "#b8a038", "#4bb0c6", "#8c6d54", "#e58fb8", "#7d8790",
    "#1f3f77", "#f4b183", "#8fd1a8", "#7a1f3d", "#c3a6e0", "#5f5a1e", "#a6dbe8", "#3f2a1d", "#f7c6de", "#d62f2f",
]  # fmt: skip
_UNREADABLE = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
)
_GREY, _INK = "#cfd3d8", "#2b2f36"
_STYLE = {
    "font.family": "sans-serif",
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
_CURVES = [
    "loss",
    "self",
    "cross",
    "mse",
    "contrastive",
    "d",
    "foscttm",
    "score",
    "lr",
    "cells_per_s",
    "data_wait",
]
_NOT_CURVES = {"step", "epoch", "best", "best_step"}
_TITLES = {
    "self": "minus ELBO self (eq. 13)",
    "cross": "minus ELBO cross (eq. 14)",
    "mse": "MSE of paired z (eq. 9)",
    "d": "discriminator (eq. 12)",
    "contrastive": "InfoNCE of pairs",
    "foscttm": "held-out FOSCTTM",
    "lr": "learning rate",
    "cells_per_s": "cells per second",
    "data_wait": "share of time waiting for data",
}


@dataclass(frozen=True)
class Profiles:
    """Cells as seen through one modality each. z: (n, D) L2-normalised; others: (n,) names, UNKNOWN where unknown."""

    z: np.ndarray
    modality: np.ndarray
    batch: np.ndarray
    cell_type: np.ndarray


def write_report(run: Path, embedding: Path | None = None, scores: Path | None = None) -> Path:
    """Write RUN/report/index.html and its figures; returns the page's path.

    Raises:
        ConfigError: no such run, embedding or scores, or a file that is not one.
    """
    if not (run / "config.json").is_file():
        fix = "train one with launch/train.py, or mend the path"
        raise ConfigError("no run here", where=f"--run {run}", got="no config.json", fix=fix)
    folder = run / "report"
    sections = [_curves_section(run, folder)]
    if embedding is not None:
        sections.append(_umap_section(embedding, folder))
    if scores is not None:
        sections.append(_scores_section(scores))
    sections.append(_config_section(run))
    folder.mkdir(exist_ok=True)
    page = folder / "index.html"
    page.write_text(
        _PAGE.format(title=html.escape(run.name), sections="\n".join(sections)), encoding="utf-8"
    )
    return page


def read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """metrics.jsonl as a table, and how many lines could not be read.

    A run that was resumed has some steps twice, and one that was killed may end in half a line: the later counts.
    """
    rows, bad = {}, 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[(row.get("split", "train"), int(row["step"]))] = {"split": "train", **row}
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
    frame = pd.DataFrame(rows.values(), columns=None if rows else ["split", "step"])
    return frame.sort_values("step", kind="stable"), bad


def read_profiles(path: Path, most: int = MOST_PROFILES, seed: int = 0) -> Profiles:
    """Each modality's own embedding of an output of `launch/embed.py`, else the joint one; `most` at random."""
    if not path.exists():
        raise ConfigError(
            "no embedding here", where=f"--embedding {path}", fix="make one with launch/embed.py"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # mudata announces a default that changes nothing here
            tables = _tables(path)
    except _UNREADABLE as error:
        got = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            "the embedding cannot be read", where=f"--embedding {path}", got=got
        ) from error
    if not tables:
        raise ConfigError(
            "no embedding in this file", where=f"--embedding {path}", expected=f"obsm[{KEY!r}]"
        )
    z = np.concatenate([z for _, z, _ in tables])
    sizes = [len(z) for _, z, _ in tables]
    keep = np.sort(np.random.default_rng(seed).permutation(len(z))[:most])
    z = z[keep].astype(np.float64)
    return Profiles(
        z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12),
        np.repeat([name for name, _, _ in tables], sizes)[keep],
        np.concatenate([_names(obs, "batch") for *_, obs in tables])[keep],
        np.concatenate([_names(obs, "cell_type") for *_, obs in tables])[keep],
    )


def draw_curves(metrics: pd.DataFrame) -> Figure:
    """Every number that was logged against the step: training as a smoothed line, validation as dots."""
    names = list_curves(metrics)
    columns = min(3, max(1, len(names)))
    n_rows = max(1, math.ceil(len(names) / columns))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.7 * columns, 2.4 * n_rows), layout="constrained")
        axes = list(figure.subplots(n_rows, columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for ax, name in zip(axes, names, strict=False):
            for split, colour in (("train", _PALETTE[0]), ("validation", _PALETTE[1])):
                part = metrics.loc[metrics["split"] == split, ["step", name]].dropna()
                handles |= _line(
                    ax, part["step"].to_numpy(), part[name].to_numpy(float), split, colour
                )
            what, *of = name.split(" ")
            ax.set_title(" ".join([_TITLES.get(what, what), *of]))
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            ax.yaxis.set_major_locator(MaxNLocator(4))
            ax.grid(axis="y", color="#eceef1", linewidth=0.8)
            ax.set_axisbelow(True)
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        for ax in axes[max(0, len(names) - columns) : len(names)]:
            ax.set_xlabel("step")
        if len(handles) > 1:
            figure.legend(
                handles.values(), handles.keys(), loc="outside upper right", ncols=2, fontsize=8
            )
    return figure


def list_curves(metrics: pd.DataFrame) -> list[str]:
    """The numbers worth a panel: known ones first, in order ("foscttm rna-adt" is a foscttm), then others that vary."""
    numeric = [
        str(c)
        for c in metrics.select_dtypes("number")
        if c not in _NOT_CURVES and metrics[c].notna().any()
    ]
    kind = {c: c.split(" ")[0] for c in numeric}
    if "foscttm" in kind.values():
        kind.pop("score", None)  # their mean
    known = sorted((c for c in kind if kind[c] in _CURVES), key=lambda c: _CURVES.index(kind[c]))
    others = [c for c in kind if c not in known and metrics[c].nunique() > 1]
    return (known + others)[:_MOST_CURVES]


def draw_scatter(xy: np.ndarray, names: np.ndarray, title: str) -> Figure:
    """Points (n, 2) coloured by name, in random order so that no group hides another; a legend on the right."""
    groups = group_legend(names)
    colours = dict(zip(groups, choose_colours(len(groups)), strict=True))
    shade = np.array([colours.get(n, _GREY) for n in names], dtype=object)
    order = np.argsort(
        np.isin(names, groups) * 1.0 + np.random.default_rng(0).random(len(names))
    )  # grey lies below
    columns = math.ceil(len(groups) / 18)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.3 + 1.5 * max(1, columns), 4.3), layout="constrained")
        ax = figure.subplots()
        size = float(np.clip(16000 / max(len(xy), 1), 1.6, 12.0))
        ax.scatter(
            xy[order, 0], xy[order, 1], s=size, c=list(shade[order]), alpha=0.75, linewidths=0
        )
        ax.set(xticks=[], yticks=[], title=title)
        ax.spines[:].set_visible(False)
        ax.set_box_aspect(1)
        entries = [*groups, *([_rest(names, groups)] if len(set(names)) > len(groups) else [])]
        dots = [
            ax.scatter([], [], s=26, color=colours.get(g, _GREY), linewidths=0) for g in entries
        ]
        labels = [g if len(g) <= 26 else g[:25] + "…" for g in entries]
        figure.legend(
            dots,
            labels,
            loc="outside right upper",
            ncols=max(1, columns),
            fontsize=8,
            handletextpad=0.2,
        )
    return figure


def group_legend(names: np.ndarray) -> list[str]:
    """The names that get a colour: the largest groups, sorted; UNKNOWN never."""
    counts = pd.Series(names[names != UNKNOWN]).value_counts()
    return sorted(map(str, counts.index[:MOST_LEGEND]), key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """`type-2` before `type-10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def choose_colours(n: int) -> list[str]:
    """n colours told apart: a fixed list, beyond it hues a golden angle apart in three shades."""
    if n <= len(_PALETTE):
        return _PALETTE[:n]
    hsv = [((i * 0.618034) % 1, (0.75, 0.5, 0.9)[i % 3], (0.8, 0.9, 0.55)[i % 3]) for i in range(n)]
    return [matplotlib.colors.to_hex(hsv_to_rgb(c)) for c in hsv]


def compute_umap(z: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, D) -> (n, 2), the same for the same seed."""
    import umap  # takes seconds to import, and only a report with an embedding needs it

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # a seed means one thread: that is what is wanted
        neighbours = max(2, min(30, len(z) - 1))
        start = "spectral" if len(z) > 50 else "random"
        fit = umap.UMAP(n_neighbors=neighbours, min_dist=0.3, init=start, random_state=seed)
        return np.asarray(fit.fit_transform(z))


def _line(ax: Any, x: np.ndarray, y: np.ndarray, split: str, colour: str) -> dict[str, Any]:
    if not len(x):
        return {}
    if split == "validation":
        return {split: ax.plot(x, y, "o-", ms=2.6, lw=1.0, color=colour)[0]}
    window = max(1, len(y) // 50)
    if window > 1:
        ax.plot(x, y, lw=0.6, color=colour, alpha=0.25)
        y = pd.Series(y).rolling(window, min_periods=1, center=True).mean().to_numpy()
    low, high = np.nanpercentile(y, [3, 97])
    margin = 0.5 * (high - low)
    if (
        len(y) > 50 and np.nanmax(y) - np.nanmin(y) > 3 * (high - low) > 0
    ):  # the first steps would flatten the rest
        ax.set_ylim(
            max(np.nanmin(y) - margin / 8, low - margin),
            min(np.nanmax(y) + margin / 8, high + margin),
        )
    return {split: ax.plot(x, y, lw=1.4, color=colour)[0]}


def _rest(names: np.ndarray, groups: Sequence[str]) -> str:
    others = len(set(names) - set(groups) - {UNKNOWN})
    return f"{others} others" if others else UNKNOWN


def _tables(path: Path) -> list[tuple[str, np.ndarray, pd.DataFrame]]:
    """(modality, z, obs) of every embedding in a file."""
    if path.suffix == ".h5mu":
        mdata = md.read_h5mu(path)
        found = [(m, a.obsm[KEY], a.obs) for m, a in mdata.mod.items() if KEY in a.obsm]
        joint = [(JOINT, mdata.obsm[KEY], mdata.obs)] if KEY in mdata.obsm else []
        return found or joint
    data = ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    whole = [(JOINT, data.obsm[KEY], data.obs)] if KEY in data.obsm else []
    found = []
    for key in [k for k in data.obsm if k.startswith(f"{KEY}_")]:
        has = ~np.isnan(data.obsm[key]).any(axis=1)
        found.append((key.removeprefix(f"{KEY}_"), data.obsm[key][has], data.obs[has]))
    return found or whole


def _names(obs: pd.DataFrame, column: str) -> np.ndarray:
    if column not in obs:
        return np.full(len(obs), UNKNOWN, dtype=object)
    return (
        obs[column]
        .astype(object)
        .where(obs[column].notna(), UNKNOWN)
        .astype(str)
        .to_numpy(dtype=object)
    )


def _curves_section(run: Path, folder: Path) -> str:
    metrics, bad = read_metrics(run / "metrics.jsonl")
    if not list_curves(metrics):
        return "<h2>Training</h2><p class='muted'>Nothing was logged.</p>"
    facts = [f"{int(metrics['step'].max()):,} steps"]
    if "epoch" in metrics:
        facts.append(f"{metrics['epoch'].max():.4g} epochs")
    if "best_step" in metrics and metrics["best_step"].notna().any():
        best = metrics.dropna(subset=["best_step"]).iloc[-1]
        facts.append(
            f"weights of step {int(best['best_step']):,}, lowest validation score {best['best']:.4f}"
        )
    if bad:
        facts.append(f"{bad} unreadable lines of metrics.jsonl left out")
    return f"<h2>Training</h2><p class='muted'>{'; '.join(facts)}.</p>" + _image(
        folder, "curves", draw_curves(metrics)
    )


def _umap_section(embedding: Path, folder: Path) -> str:
    profiles = read_profiles(embedding)
    xy = compute_umap(profiles.z)
    through = (
        "everything observed in it" if (profiles.modality == JOINT).all() else "one modality alone"
    )
    out = [
        f"<h2>Embedding</h2><p class='muted'>UMAP of {len(xy):,} profiles of {html.escape(embedding.name)}, each a cell"
        f" seen through {through}, scaled to length 1.</p><div class='row'>"
    ]
    for field, title in (("modality", "modality"), ("batch", "batch"), ("cell_type", "cell type")):
        names = getattr(profiles, field)
        if (names != UNKNOWN).any():
            out.append(_image(folder, f"umap_{field}", draw_scatter(xy, names, title)))
    return "".join([*out, "</div>"])


def _scores_section(path: Path) -> str:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            _score_row(pair, scope, entry)
            for pair, entry in scores.items()
            if pair != "about"
            for scope in SCOPES
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "make them with launch/evaluate.py"
        raise ConfigError(
            "the scores cannot be read", where=f"--scores {path}", got=error, fix=fix
        ) from None
    head = "".join(
        f"<th>{name}</th><th class='muted'>chance</th>"
        for name in ("FOSCTTM ↓", "match ↑", "recall at 10 ↑")
    )
    return f"""<h2>Matching</h2>
<p class='muted'>Each cell seen through one modality looks for itself in the other; both directions averaged.</p>
<table><tr><th>pair</th><th>among</th><th>cells</th>{head}</tr>
{"".join(rows)}</table>"""


def _score_row(pair: str, scope: str, entry: dict[str, Any]) -> str:
    chance = entry.get("chance", {}).get(scope, {"foscttm": 0.5})
    cells = [pair.replace("->", " → "), scope.replace("_", " "), f"{entry['cells']:,}"]
    text = "".join(f"<td>{html.escape(c)}</td>" for c in cells)
    numbers = "".join(
        f"<td>{_number(entry[scope][m])}</td><td class='muted'>{_number(chance.get(m))}</td>"
        for m in METRICS
    )
    return f"<tr>{text}{numbers}</tr>\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _config_section(run: Path) -> str:
    text = (run / "config.json").read_text(encoding="utf-8")
    return f"<h2>Config</h2><details><summary>resolved config</summary><pre>{html.escape(text)}</pre></details>"


def _image(folder: Path, name: str, figure: Figure) -> str:
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", metadata={"Software": None})  # equal data, equal bytes
    (folder / f"{name}.png").write_bytes(buffer.getvalue())
    data = base64.b64encode(buffer.getvalue()).decode()
    width = int(figure.get_figwidth() * 100)
    return f"<img alt='{name}' style='width:{width}px' src='data:image/png;base64,{data}'>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #2b2f36; max-width: 1180px; margin: 2.5rem auto }}
body {{ padding: 0 1.5rem }}
h1 {{ font-weight: 600; margin-bottom: 0 }} h2 {{ font-weight: 600; font-size: 1.15rem; margin-top: 2.5rem }}
.muted {{ color: #7d8790 }} .row {{ display: flex; flex-wrap: wrap; gap: 1rem }} img {{ max-width: 100% }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .3rem .8rem; border-bottom: 1px solid #eceef1 }} th {{ font-weight: 600 }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }}
pre {{ background: #f6f7f9; padding: 1rem; overflow-x: auto; font-size: 13px }}
</style></head><body><h1>{title}</h1>
{sections}
</body></html>
"""
