"""What was logged, as panels of curves: scores, held-out losses, speed, and training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from clue_dist.checkpoint.metrics_lines import read_metrics_lines

MOST_POINTS = 400  # of a curve; of more, neighbouring ones are averaged
_DIGITS = 6  # significant digits of a number in the page
_TRAIN, _VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Curve:
    """One number that was logged."""

    name: str  # what the legend says: a modality, a pair of them, a term
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    note: str  # what the number means, and which way is better
    curves: list[Curve]
    reference: float | None = None  # a value to compare with, such as that of perfect mixing
    # What is shown of the axis: the first steps of a run would flatten the rest.
    low: float = 0.0
    high: float = 1.0


# Quantity, title, note and reference of scores and losses of held-out cells.
_SCORES: tuple[tuple[str, str, str, float | None], ...] = (
    ("foscttm", "FOSCTTM", "cells nearer than the true partner; lower is better", None),
    ("mixing", "mixing", "neighbours of the other modality; 0.5 is perfect", 0.5),
    ("islands", "worst island", "by pattern of observed modalities; 1 is none", 1.0),
    ("accuracy", "label accuracy", "by neighbours in the joint z; higher is better", None),
    ("ilisi", "iLISI of batches", "in the joint z; 1 is perfect mixing", 1.0),
)
_PAIR_LOSSES: tuple[tuple[str, str, str, float | None], ...] = (
    ("contrastive", "InfoNCE", "between the modalities of a cell", None),
    ("mse", "distance of z (eq. 9)", "between the modalities of a cell", None),
    ("d", "discriminator (eq. 12)", "log-probability of the true modality", None),
)
_SPEED: tuple[tuple[str, str, str], ...] = (
    ("cells_per_s", "cells per second", "over all ranks"),
    ("data_wait", "waiting for data", "share of the time"),
    ("saving_wait", "waiting for a save", "share of the time"),
    ("peak_memory_gb", "peak memory of a GPU", "GiB"),
    ("peak_host_memory_gb", "peak memory of rank 0", "GiB"),
)
_BATCH_TERMS: tuple[tuple[str, str], ...] = (
    ("loss", "loss"),
    ("contrastive", "InfoNCE"),
    ("mse", "distance of z (eq. 9)"),
    ("d", "discriminator (eq. 12)"),
    ("lr", "learning rate"),
)
# Numbers that tell of another step than that of their line, or are shown in another panel.
_NOT_CURVES = {
    "step", "epoch", "best", "best_step", "best_score", "lowest_score", "lowest_step", "error",
    "self", "cross", "score", "in_a_row",
}  # fmt: skip


def read_metrics(path: Path) -> tuple[pd.DataFrame, int]:
    """Read metrics.jsonl.

    A run that was resumed has some steps twice, of which the later line counts. A run that was
    killed may end in half a line.

    Returns:
        The metrics, a row for each step and split; and how many lines could not be read.
    """
    lines = read_metrics_lines(path)
    found = [{"split": _TRAIN, **line.row} for line in lines if line.row is not None]
    # Two events of one step are two events.
    rows = {(str(row["split"]), row["step"], str(row.get("event"))): row for row in found}
    frame = pd.DataFrame(rows.values(), columns=None if rows else ["split", "step"])
    return frame.sort_values("step", kind="stable"), len(lines) - len(found)


def list_panels(metrics: pd.DataFrame) -> dict[str, list[Panel]]:
    """List the panels of a run by section: "scores", "losses", "speed" and "batches".

    Args:
        metrics: as `read_metrics` gives it.
    """
    held_out = _collect_curves(metrics, _VALIDATION)
    training = _collect_curves(metrics, _TRAIN)
    scores = [*_list_pair_panels(held_out, _SCORES)]
    if "foscttm" not in held_out and "score" in held_out:  # else the score is their mean
        note = "minus the ELBOs of a held-out cell; lower is better"
        scores.insert(0, _make_panel("score", note, held_out["score"].values()))
    losses = [*_list_modality_panels(held_out), *_list_pair_panels(held_out, _PAIR_LOSSES)]
    known = {name for name, *_ in (*_SCORES, *_PAIR_LOSSES)} | _NOT_CURVES
    losses += [
        _make_panel(quantity, "", curves.values())
        for quantity, curves in held_out.items()
        if quantity not in known
    ]
    speed = [
        _make_panel(title, note, training[name].values())
        for name, title, note in _SPEED
        if name in training
    ]
    return {"scores": scores, "losses": losses, "speed": speed, "batches": _list_batches(training)}


def _list_modality_panels(held_out: dict[str, dict[str, Curve]]) -> Iterator[Panel]:
    """Minus the ELBOs of each modality: from itself, and from the others."""
    titles = {"self": "from itself (eq. 5)", "cross": "from all observed (eq. 8)"}
    modalities = dict.fromkeys(name for term in titles for name in held_out.get(term, {}))
    for modality in modalities:
        curves = [
            Curve(title, held_out[term][modality].steps, held_out[term][modality].values)
            for term, title in titles.items()
            if modality in held_out.get(term, {})
        ]
        yield _make_panel(
            f"{modality or 'all'}, minus ELBO", "nats of a cell; lower is better", curves
        )


def _list_pair_panels(
    held_out: dict[str, dict[str, Curve]],
    quantities: Sequence[tuple[str, str, str, float | None]],
) -> Iterator[Panel]:
    """A panel for each quantity, with a curve for each modality or pair of them."""
    for quantity, title, note, reference in quantities:
        if quantity in held_out:
            yield _make_panel(title, note, held_out[quantity].values(), reference)


def _list_batches(training: dict[str, dict[str, Curve]]) -> list[Panel]:
    """Terms of training batches; and what else was logged of them and varies."""
    panels = [
        _make_panel(title, "mean of the steps since the last line", training[name].values())
        for name, title in _BATCH_TERMS
        if name in training
    ]
    known = {name for name, *_ in (*_SPEED, *_BATCH_TERMS)} | _NOT_CURVES
    panels += [
        _make_panel(name, "", curves.values())
        for name, curves in training.items()
        if name not in known and any(len(set(curve.values)) > 1 for curve in curves.values())
    ]
    return panels


def _collect_curves(metrics: pd.DataFrame, split: str) -> dict[str, dict[str, Curve]]:
    """The curves of a split by quantity, then by modality or pair ("" where there is none)."""
    rows = metrics[metrics["split"] == split]
    curves: dict[str, dict[str, Curve]] = {}
    for column in rows.select_dtypes("number"):
        logged = rows.loc[np.isfinite(rows[column].to_numpy(float)), ["step", column]]
        if column != "step" and len(logged):
            quantity, modality = split_quantity(str(column))
            curve = _thin_curve(modality, logged["step"].to_numpy(), logged[column].to_numpy(float))
            curves.setdefault(quantity, {})[modality] = curve
    return curves


def split_quantity(name: str) -> tuple[str, str]:
    """Split a name of a number into the quantity and the modality or pair, "" where it has none.

    Earlier versions called "foscttm/rna-adt" "foscttm rna-adt".
    """
    quantity, _, modality = name.replace(" ", "/").partition("/")
    return quantity, modality


def _thin_curve(name: str, steps: np.ndarray, values: np.ndarray) -> Curve:
    """A curve of at most MOST_POINTS points, each the mean of as many that were logged."""
    size = -(-len(steps) // MOST_POINTS)
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    means = np.add.reduceat(values, starts) / counts
    return Curve(
        name,
        [int(step) for step in steps[starts + counts - 1]],
        [float(f"{value:.{_DIGITS}g}") for value in means],
    )


def _make_panel(
    title: str, note: str, curves: Iterable[Curve], reference: float | None = None
) -> Panel:
    """A panel whose axis shows what most of the values need."""
    shown = list(curves)
    low, high = _choose_limits([np.array(curve.values) for curve in shown], reference)
    return Panel(title, note, shown, reference, low, high)


def _choose_limits(curves: list[np.ndarray], reference: float | None) -> tuple[float, float]:
    """The ends of an axis, with a margin; single values far off all others are left out."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if not len(values):
        return 0.0, 1.0
    lowest, highest = float(values.min()), float(values.max())
    low, high = (float(value) for value in np.percentile(values, [4, 92]))
    if len(values) > 12 and highest - lowest > 3 * (high - low) > 0:
        lowest, highest = max(lowest, low - (high - low)), min(highest, high + (high - low))
    if reference is not None:
        lowest, highest = min(lowest, reference), max(highest, reference)
    margin = 0.06 * (highest - lowest) or 0.06 * abs(highest) or 1.0
    return lowest - margin, highest + margin
