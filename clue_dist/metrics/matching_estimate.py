"""Scores of sets too large to compare all pairs: random cells against everyone.

A random part of the cells is asked, and each is compared with all profiles, a slice of them at a
time. So every score is a mean over independent cells, and its standard error is known. Profiles may
lie on the disk, as memory maps; work is in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import DataError, format_count
from clue_dist.metrics.integration import MIXING_NEIGHBOURS
from clue_dist.neighbours.nearest import scale_to_length_one

_KEYS_AT_ONCE = 2**14
_RECALLS = (1, 10)
_PART_MATCHED = 5  # of so many drawn cells one adds to the matching score, which takes longer
_SAMPLE = 2**14  # profiles that rule out most of those that choose another one
# Rounding sets profiles apart that are equal: what is so little nearer does not count.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class EstimatedScore:
    """A score with its uncertainty."""

    value: float
    standard_error: float  # of the draw of cells

    def __str__(self) -> str:
        return f"{self.value:.4f} +- {self.standard_error:.4f}"


@dataclass(frozen=True)
class _AskedCells:
    """What the profiles of one modality of the drawn cells found."""

    nearer: np.ndarray  # (n,), how many profiles of the other modality are nearer than the partner
    nearest: np.ndarray  # (n,), the nearest of the other modality
    other_share: np.ndarray  # (n,), of the 30 nearest of both, the share of the other modality


def estimate_matching(
    first: np.ndarray, second: np.ndarray, n_queries: int = 2_000, seed: int = 0
) -> dict[str, EstimatedScore]:
    """Estimate how well two embeddings of the same cells find each other among all N of them.

    Args:
        first: (N, D), cells seen through one modality.
        second: (N, D), row i is of the same cell as row i of `first`.
        n_queries: cells that are drawn, and ask in both directions; all where there are fewer.
        seed: of the draw.

    Returns:
        "foscttm" (eq. 18), "recall1", the share of cells whose nearest profile is their own,
        "recall10", and "match" (eq. 16 and 17), of a fifth of the cells, as if no two profiles
        were equal; each the mean of both directions. And "mixing", the share of the other modality
        among the 30 nearest profiles of both.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise DataError(
            "two embeddings of the same cells are needed",
            got=(first.shape, second.shape),
            expected="(N, D) twice",
        )
    n_cells = len(first)
    drawn = np.random.default_rng(seed).permutation(n_cells)[:n_queries]
    rows = np.sort(drawn)
    forward, backward = asked = [_ask(first, second, rows), _ask(second, first, rows)]
    nearer = np.stack([found.nearer for found in asked])
    is_matched = np.isin(rows, drawn[: -(-len(drawn) // _PART_MATCHED)])
    matched = [
        _score_matches(first, second, rows, is_matched, forward, backward),
        _score_matches(second, first, rows, is_matched, backward, forward),
    ]
    per_cell = {"foscttm": (nearer / n_cells).mean(0)} | {
        f"recall{count}": (nearer < count).mean(0) for count in _RECALLS
    }
    per_cell |= {
        "match": np.mean(matched, 0),
        "mixing": np.mean([found.other_share for found in asked], 0),
    }
    return {name: _estimate_mean(values, n_cells) for name, values in per_cell.items()}


def _estimate_mean(values: np.ndarray, n_cells: int) -> EstimatedScore:
    """The mean over all cells, of those of which values are known."""
    # Cells are drawn without replacement: of all cells nothing is left to chance.
    unseen = 1 - len(values) / n_cells
    if len(values) < 2:
        return EstimatedScore(float(values.mean()), np.nan)
    error = float(values.std(ddof=1) * np.sqrt(unseen / len(values)))
    return EstimatedScore(float(values.mean()), error)


def _ask(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> _AskedCells:
    """Compare some queries with all profiles of both modalities."""
    points, partners = _read_profiles(queries, rows), _read_profiles(keys, rows)
    least = (points * partners).sum(1, keepdim=True) + _ROUNDING
    nearer = torch.zeros(len(rows), dtype=torch.int64)
    best, nearest = torch.full((len(rows),), -torch.inf), torch.zeros(len(rows), dtype=torch.int64)
    cosines, is_other = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.bool)
    for part in _slice_rows(len(keys)):
        products = points @ _read_profiles(keys, part).T
        nearer += (products > least).sum(1)
        value, place = products.max(1)
        nearest = torch.where(value > best, place + int(part[0]), nearest)
        best = torch.maximum(value, best)
        cosines, is_other = _keep_nearest(cosines, is_other, products, True)
        products = points @ _read_profiles(queries, part).T
        asked = np.flatnonzero((rows >= part[0]) & (rows <= part[-1]))
        products[asked, rows[asked] - part[0]] = -torch.inf  # none is its own neighbour
        cosines, is_other = _keep_nearest(cosines, is_other, products, False)
    is_known = cosines > -torch.inf
    shares = (is_other & is_known).sum(1) / is_known.sum(1)
    return _AskedCells(nearer.numpy(), nearest.numpy(), shares.numpy())


def _keep_nearest(
    cosines: Tensor, is_other: Tensor, products: Tensor, other: bool
) -> tuple[Tensor, Tensor]:
    """The nearest of those found before, and of new ones that are all of one modality."""
    found = products.topk(min(MIXING_NEIGHBOURS, products.shape[1])).values
    cosines = torch.cat([cosines, found], 1)
    is_other = torch.cat([is_other, torch.full(found.shape, other)], 1)
    nearest = cosines.topk(min(MIXING_NEIGHBOURS, cosines.shape[1]))
    return nearest.values, is_other.gather(1, nearest.indices)


def _score_matches(
    queries: np.ndarray,
    keys: np.ndarray,
    rows: np.ndarray,
    is_matched: np.ndarray,
    forward: _AskedCells,
    backward: _AskedCells,
) -> np.ndarray:
    """What some of the drawn cells add to the matching score of one direction.

    See `clue_dist.metrics.matching.score_matches`, here without profiles that are equal.
    """
    shared = (forward.nearer == 0).astype(float) + (backward.nearer == 0)
    # Only a cell that found its partner, or was found by it, has a score other than zero.
    scored = np.flatnonzero(is_matched & (shared > 0))
    scores = np.zeros(len(rows))
    choosers, choices = _find_choosers(queries, keys, rows, scored)
    n_choosing = np.bincount(choices, minlength=len(rows))
    n_mutual = np.bincount(choices[choosers == forward.nearest[choices]], minlength=len(rows))
    row_sum = (1 + n_choosing - 2 * n_mutual) / 3 + n_mutual
    scores[scored] = (shared / (4 - shared) / row_sum)[scored]
    return scores[is_matched]


def _find_choosers(
    queries: np.ndarray, keys: np.ndarray, rows: np.ndarray, scored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the keys whose nearest query of all is one of some drawn ones.

    Args:
        queries: (N, D).
        keys: (N, D).
        rows: (n,), the drawn queries.
        scored: places in `rows` of those that are meant.

    Returns:
        Keys, and for each the place in `rows` of its nearest query.
    """
    points, found = _read_profiles(queries, rows), []
    for part in _slice_rows(len(keys)):
        products = _read_profiles(keys, part) @ points.T
        best, choice = (values.numpy() for values in products.max(1))
        is_scored = np.isin(choice, scored)
        found.append((part[is_scored], choice[is_scored], best[is_scored]))
    choosers, choices, cosines = (np.concatenate(values) for values in zip(*found, strict=True))
    # A few profiles rule out most keys, so that few have to be compared with all profiles.
    sample = np.sort(np.random.default_rng(0).permutation(len(queries))[:_SAMPLE])
    for part in (sample, *_slice_rows(len(queries))):
        others = _read_profiles(queries, part).T
        stays = np.ones(len(choosers), bool)
        for place in _slice_rows(len(choosers)):
            products = _read_profiles(keys, choosers[place]) @ others
            chosen = rows[choices[place]]
            column = np.searchsorted(part, chosen).clip(max=len(part) - 1)
            is_here = np.flatnonzero(part[column] == chosen)
            products[is_here, column[is_here]] = -torch.inf  # no profile rules itself out
            stays[place] = products.amax(1).numpy() <= cosines[place]
        choosers, choices, cosines = choosers[stays], choices[stays], cosines[stays]
    return choosers, choices


def _slice_rows(n_rows: int) -> Iterator[np.ndarray]:
    """Rows of consecutive slices."""
    for start in range(0, n_rows, _KEYS_AT_ONCE):
        yield np.arange(start, min(start + _KEYS_AT_ONCE, n_rows))


def _read_profiles(points: np.ndarray, rows: np.ndarray) -> Tensor:
    """Some rows, of length 1, as float32."""
    profiles = torch.from_numpy(np.asarray(points[rows], np.float32))
    n_wrong = int((~profiles.isfinite()).any(1).sum())
    if n_wrong:
        raise DataError(
            "the embedding is not finite", got=f"{format_count(n_wrong, 'cell')} with NaN or Inf"
        )
    return scale_to_length_one(profiles)
