"""Labels carried from reference cells to queries, with a calibrated confidence, or "unknown".

A query's nearest reference cells vote, the nearer ones more. How often the winner of such a vote is
right is read off the reference itself: each of its cells is asked as a query, its own vote left
out. Votes cannot tell a type that the reference lacks, as some type always wins. So a second number
says how far a query lies from every type of the reference: see `clue_dist.neighbours.novelty`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clue_dist.errors import DataError, name_argument
from clue_dist.neighbours.nearest import find_neighbours
from clue_dist.neighbours.novelty import NoveltyScale
from clue_dist.number_checks import require_number
from clue_dist.progress import show_progress

UNKNOWN_LABEL = "unknown"
_QUERIES_AT_ONCE = 2**16
_FEWEST_CALIBRATION = 30  # cells without which votes stand for confidence


@dataclass(frozen=True)
class TransferSettings:
    """How labels are carried over."""

    n_neighbours: int = 15  # that vote
    kept: float = 0.9  # share of the cells of known types that are not to be called unknown
    least_confidence: float = 0.0  # below which a label is "unknown", too

    def __post_init__(self) -> None:
        require_number("n_neighbours", self.n_neighbours, 1, whole=True)
        require_number(name_argument("kept"), self.kept, 0, 1, above=True)
        require_number(name_argument("least_confidence"), self.least_confidence, 0, 1)


@dataclass(frozen=True, eq=False)
class LabelTransfer:
    """A reference that queries can be asked against; `fit_label_transfer` makes it."""

    keys: Tensor  # (R, D), of the reference cells
    codes: np.ndarray  # (R,)
    names: np.ndarray  # (C,), of the types
    settings: TransferSettings
    novelty_scale: NoveltyScale  # of the reference, seen through what is measured in queries
    votes: np.ndarray  # (b,), shares of the winner at which confidence is known
    confidence: np.ndarray  # (b,)
    is_calibrated: bool

    def assign_labels(self, queries: np.ndarray) -> pd.DataFrame:
        """Label queries (n, D).

        Returns:
            `label`, which may be "unknown"; `nearest_label`, the winner of the vote whatever else
            holds; `confidence`, the probability that the winner is right of a cell whose type the
            reference has; `novelty`, the share of the reference's cells that lie nearer to a type.
            That depends on the other queries, where there are 100 or more.
        """
        # In slices, as float64 and what is computed of it would fill the memory.
        votes = [np.empty((0, len(self.names)))]
        with show_progress("labelling", len(queries)) as progress:
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                points = torch.as_tensor(queries[start : start + _QUERIES_AT_ONCE]).double()
                votes.append(_count_votes(points, self.keys, self.codes, self.names, self.settings))
                progress.mark_done(len(points))
        shares = np.concatenate(votes)
        winner = shares.argmax(1)
        confidence = np.interp(shares.max(1), self.votes, self.confidence)
        novelty = self.novelty_scale.measure_novelty(queries)
        is_unknown = (novelty > self.settings.kept) | (confidence < self.settings.least_confidence)
        nearest = self.names[winner].astype(object)
        return pd.DataFrame(
            {
                "label": pd.Categorical(
                    np.where(is_unknown, UNKNOWN_LABEL, nearest),
                    categories=[*self.names, UNKNOWN_LABEL],
                ),
                "nearest_label": pd.Categorical(nearest, categories=self.names),
                "confidence": confidence,
                "novelty": novelty,
            }
        )


def fit_label_transfer(
    reference: np.ndarray,
    labels: np.ndarray,
    views: np.ndarray | None = None,
    settings: TransferSettings | None = None,
) -> LabelTransfer:
    """Fit what labels queries by a reference.

    Args:
        reference: (R, D), z of labelled cells.
        labels: (R,) names. Cells that are "unknown" in the reference teach nothing: it is what a
            query is called that is like no type.
        views: (R, D), z of the same cells from what is measured in queries, NaN where that was not
            measured in a reference cell. Confidence and novelty are calibrated on it. By default
            the reference itself.
        settings: how labels are carried over.

    Raises:
        DataError: fewer than two labelled cells, or values that are not finite.
    """
    settings = settings or TransferSettings()
    is_known = np.asarray(labels, str) != UNKNOWN_LABEL
    keys = torch.as_tensor(reference[is_known]).double()
    if len(keys) < 2:
        raise DataError("the reference needs two labelled cells", got=len(keys))
    names, codes = np.unique(np.asarray(labels, str)[is_known], return_inverse=True)
    seen = keys if views is None else torch.as_tensor(views[is_known]).double()
    rows = np.flatnonzero(seen.isfinite().all(1).numpy())
    is_calibrated = len(rows) >= _FEWEST_CALIBRATION
    if not is_calibrated:
        seen, rows = keys, np.arange(len(keys))
    points = seen[rows]
    title = "calibrating confidence"
    shares = _count_votes(points, keys, codes, names, settings, rows, title)
    votes, confidence = _calibrate_votes(shares.max(1), shares.argmax(1) == codes[rows])
    scale = NoveltyScale.fit(points, codes[rows], len(names))
    return LabelTransfer(keys, codes, names, settings, scale, votes, confidence, is_calibrated)


def _count_votes(
    points: Tensor,
    keys: Tensor,
    codes: np.ndarray,
    names: np.ndarray,
    settings: TransferSettings,
    itself: np.ndarray | None = None,
    title: str = "",
) -> np.ndarray:
    """Shares of the weighted votes of the nearest keys, (n, C).

    A vote weighs 1 - (d / d_last)^2, by the distance of the first neighbour that does not vote.

    Args:
        points: (n, D).
        keys: (R, D).
        codes: (R,).
        names: (C,).
        settings: how many vote.
        itself: (n,), the key that is the same cell as each point and does not vote.
        title: as of `find_neighbours`.
    """
    count = settings.n_neighbours + 1 + (itself is not None)
    found = find_neighbours(points, count, keys, title=title)
    indices, distances = found.indices, found.distances.copy()
    if itself is not None:
        distances[indices == itself[:, None]] = np.inf
        order = distances.argsort(1, kind="stable")
        indices, distances = (np.take_along_axis(u, order, 1) for u in (indices, distances))
    voters = min(settings.n_neighbours, max(1, len(keys) - 1 - (itself is not None)))
    last = np.where(np.isfinite(distances), distances, 0).max(1, keepdims=True)
    if distances.shape[1] > voters:
        last = distances[:, voters : voters + 1]
    weights = np.maximum(1 - (distances[:, :voters] / np.maximum(last, 1e-12)) ** 2, 1e-3)
    shares = np.zeros((len(points), len(names)))
    rows = np.repeat(np.arange(len(points)), voters)
    np.add.at(shares, (rows, codes[indices[:, :voters]].ravel()), weights.ravel())
    return np.asarray(shares / shares.sum(1, keepdims=True))


def _calibrate_votes(shares: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the winner, and how often it is right there: isotonic regression of both."""
    from sklearn.isotonic import IsotonicRegression

    # One right and one wrong vote at each end: no share is certain.
    x = np.concatenate([shares, [0, 0, 1, 1]])
    y = np.concatenate([is_right, [0, 1, 0, 1]]).astype(float)
    fitted = IsotonicRegression(y_min=0, y_max=1).fit(x, y)
    return np.asarray(fitted.X_thresholds_), np.asarray(fitted.y_thresholds_)
