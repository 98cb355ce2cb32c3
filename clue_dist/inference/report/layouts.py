"""The embedding as a section of the page: UMAPs, what to colour them by, confusion of labels."""

from __future__ import annotations

import importlib
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from clue_dist.inference.report.figures import choose_colours, group_legend, name_rest
from clue_dist.inference.report.profiles import UNKNOWN, EmbeddedFile, Profiles
from clue_dist.metrics.integration import LABEL_NEIGHBOURS, predict_labels
from clue_dist.process import print_error
from clue_dist.store.kernel_cache import retry_with_cache

MOST_LABELS = 40  # of a confusion matrix, the most frequent ones
_RESOLUTION = 4095  # coordinates in the page are whole numbers up to this
_SILENCE = 10  # seconds after which a step that goes on says so
_COLUMNS = {
    "modality": "modality",
    "cell_type": "cell type",
    "batch": "batch",
    "pattern": "observed",
}


@dataclass(frozen=True)
class Colouring:
    """Names of points, and the colours of the largest groups of them."""

    title: str
    names: list[str]
    colours: list[str]
    codes: list[int]  # group of each point; -1 of a point that belongs to none of them
    rest: str | None  # what the points of no group are called


@dataclass(frozen=True)
class Layout:
    """Profiles in a plane."""

    title: str
    note: str
    x: list[int]
    y: list[int]
    colourings: list[Colouring]


@dataclass(frozen=True)
class Confusion:
    """Labels of one modality's profiles, and what another modality's profiles say of them."""

    queries: str  # the modality whose profiles are given a label
    keys: str  # the modality whose profiles have the labels
    labels: list[str]
    counts: list[list[int]]  # by true label, then by label given
    accuracy: float
    n_cells: int


@contextmanager
def announce_progress(text: str) -> Iterator[None]:
    """Print a step, that it still goes on every few seconds, and how long it took."""
    print_error(f"{text} ...")
    started, is_over = time.monotonic(), threading.Event()

    def speak_meanwhile() -> None:
        while not is_over.wait(_SILENCE):
            print_error(f"{text}: {time.monotonic() - started:.0f} s so far")

    speaker = threading.Thread(target=speak_meanwhile, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        is_over.set()
        speaker.join()
    print_error(f"{text}: {time.monotonic() - started:.1f} s")


def compute_layouts(embedded: EmbeddedFile) -> list[tuple[Layout, Profiles, np.ndarray]]:
    """Lay out the joint z and the profiles of the modalities, each by a UMAP of its own.

    Returns:
        Each layout with its profiles and their coordinates, (n, 2).
    """
    kinds = (
        (embedded.joint, "joint z", "each a cell seen through everything observed in it"),
        (embedded.alone, "modalities", "each a cell seen through one modality alone"),
    )
    layouts = []
    for profiles, title, meaning in kinds:
        if profiles is not None:
            n_points = len(profiles.z)
            with announce_progress(f"UMAP of {n_points:,} points, {title}"):
                points = compute_umap(profiles.z)
            note = f"{n_points:,} points, {meaning}, scaled to length 1"
            layouts.append((_describe_layout(profiles, points, title, note), profiles, points))
    return layouts


def compute_umap(latent: np.ndarray) -> np.ndarray:
    """Lay out profiles in two dimensions, each time alike.

    Args:
        latent: (n, D).

    Returns:
        (n, 2).
    """
    if len(latent) < 3:  # which have no neighbours that a layout could keep
        return np.arange(2.0 * len(latent)).reshape(-1, 2)
    # It takes seconds to import, and only a report with an embedding needs it.
    umap = retry_with_cache(lambda: importlib.import_module("umap"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a seed means one thread, as is wanted
        neighbours = max(2, min(30, len(latent) - 1))
        start = "spectral" if len(latent) > 50 else "random"
        layout = umap.UMAP(n_neighbors=neighbours, min_dist=0.3, init=start, random_state=0)
        return np.asarray(layout.fit_transform(latent))


def list_colourings(profiles: Profiles) -> list[Colouring]:
    """List what points can be coloured by; a column that is the same everywhere tells nothing."""
    colourings = []
    columns = [(title, getattr(profiles, column)) for column, title in _COLUMNS.items()]
    for title, names in [*columns, *profiles.levels.items()]:
        if len(set(names)) > 1:
            groups = group_legend(names)
            number = {name: code for code, name in enumerate(groups)}
            codes = [number.get(name, -1) for name in names]
            rest = name_rest(names, groups) if -1 in codes else None
            colours = choose_colours(len(groups))
            colourings.append(Colouring(title, groups, colours, codes, rest))
    return colourings


def _describe_layout(profiles: Profiles, points: np.ndarray, title: str, note: str) -> Layout:
    """A layout in whole numbers, both axes to the same scale and y upwards."""
    low, high = points.min(0), points.max(0)
    scale = _RESOLUTION / max(float((high - low).max()), 1e-12)
    x, y = ((points - low) * scale).round().astype(int).T
    return Layout(title, note, x.tolist(), (y.max() - y).tolist(), list_colourings(profiles))


def list_confusions(alone: Profiles) -> list[Confusion]:
    """List for every ordered pair of modalities how labels pass from one's profiles to the other's.

    A profile gets the label that `predict_labels` gives it from labelled profiles of the other
    modality.
    """
    known = alone.select_rows(alone.cell_type != UNKNOWN)
    confusions = []
    for queries, keys in permutations(dict.fromkeys(known.modality), 2):
        asked, asking = (known.select_rows(known.modality == name) for name in (keys, queries))
        labels, counts = np.unique(asking.cell_type, return_counts=True)
        if len(labels) > 1 and len(asked.z) > LABEL_NEIGHBOURS:
            names, codes = np.unique(asked.cell_type, return_inverse=True)
            found = names[predict_labels(asking.z, asked.z, codes, asking.cell, asked.cell)]
            order = np.sort(np.argsort(-counts, kind="stable")[:MOST_LABELS])
            confusions.append(_count_labels(queries, keys, asking.cell_type, found, labels[order]))
    return confusions


def _count_labels(
    queries: str, keys: str, truth: np.ndarray, found: np.ndarray, labels: np.ndarray
) -> Confusion:
    """Count the cells by true label and label given; labels that are not listed are left out."""
    number = {name: code for code, name in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), int)
    for true_label, label in zip(truth, found, strict=True):
        if true_label in number and label in number:
            counts[number[true_label], number[label]] += 1
    accuracy = float((truth == found).mean())
    return Confusion(
        queries, keys, [str(name) for name in labels], counts.tolist(), accuracy, len(truth)
    )
