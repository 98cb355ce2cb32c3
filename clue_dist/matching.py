"""How well two embeddings of the same cells find each other: FOSCTTM, matching score, recall at 10.

Row i of `u1` and row i of `u2` are one cell, read from two modalities: a pair. Rows are scaled to
length 1 first. Distances are squared Euclidean, in float64, computed for a slice of query rows at a
time, so that memory is O(N) and never N x N. Every score is a sum over query rows, so ranks share
the work: each ranks keys for its slice of the queries (`rank_keys`), and the slices are joined
(`join_ranked_keys`).

Only keys that are strictly nearer count against a cell. So an embedding collapsed to one point has
a FOSCTTM of 0, which `match` and `recall10` give away. NaN would have the same, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import DataError
from clue_dist.neighbours import compute_distances, scale_to_length_one
from clue_dist.ranks import Ranks

METRICS = ("foscttm", "match", "recall10")
SCOPES = ("global", "within_batch")
DIRECTIONS = ("forward", "backward")
_RECALL_AT = 10

Scores = dict[str, dict[str, float]]  # scope -> metric -> value
_Pair = tuple[Tensor, Tensor]  # two embeddings (N, D) of the same cells


@dataclass(frozen=True)
class RankedKeys:
    """How a slice of n queries ranks all keys."""

    n_nearer: int  # keys nearer than the query's partner, summed over the queries
    n_found: int  # queries whose partner is among the 10 nearest keys
    nearest: np.ndarray  # (n,) int64, the nearest key of each query

    def to_plain(self) -> list[Any]:
        """Turn it into plain data, as ranks exchange it."""
        return [self.n_nearer, self.n_found, self.nearest.tolist()]

    @classmethod
    def from_plain(cls, value: list[Any]) -> RankedKeys:
        """Make of it again what `to_plain` turned into plain data."""
        n_nearer, n_found, nearest = value
        return cls(n_nearer, n_found, np.asarray(nearest, np.int64))


def compute_scores(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, batch: np.ndarray, ranks: Ranks | None = None
) -> Scores:
    """Score how two embeddings match, both directions averaged.

    Arguments and errors are those of `score_directions`.
    """
    return average_directions(score_directions(u1, u2, batch, ranks))


def average_directions(directed: dict[str, Scores]) -> Scores:
    """Average what `score_directions` gives over both directions."""
    return {
        scope: {
            metric: float(np.mean([directed[direction][scope][metric] for direction in DIRECTIONS]))
            for metric in METRICS
        }
        for scope in SCOPES
    }


def score_directions(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, batch: np.ndarray, ranks: Ranks | None = None
) -> dict[str, Scores]:
    """Score `forward`, where row i of u1 looks for row i of u2, and `backward` apart.

    In the scope "global" a cell looks among all cells, in "within_batch" among those of its batch,
    and batches count by their cells. Batches of one cell are left out. A scope without cells has
    NaN for all scores.

    Args:
        u1: (N, D), on any device; every rank passes the same.
        u2: (N, D).
        batch: (N,) names or codes; equal values are one batch.
        ranks: processes that share the queries. All must call, and all get the result.

    Returns:
        Scores by direction.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    x, y = _check_embeddings(u1, u2)
    groups = _group_cells(batch, x.device)
    # Of a single batch the second scope is the first.
    scopes = [scope for scope in SCOPES if scope == "global" or not _is_one_batch(groups)]
    pairs = [
        (scale_to_length_one(x[group]), scale_to_length_one(y[group]))
        for scope in scopes
        for group in groups[scope]
    ]
    sums = (
        _sum_metrics(pair, *ranked)
        for pair, ranked in zip(pairs, _rank_pairs(pairs, ranks or Ranks()), strict=True)
    )
    directed: dict[str, Scores] = {direction: {} for direction in DIRECTIONS}
    for scope in scopes:
        totals = np.zeros((len(DIRECTIONS), len(METRICS)))
        for _ in groups[scope]:
            totals += next(sums)
        cells = sum(len(group) for group in groups[scope]) or float("nan")
        for direction, total in zip(DIRECTIONS, totals, strict=True):
            directed[direction][scope] = dict(zip(METRICS, (total / cells).tolist(), strict=True))
    for scores in directed.values():
        scores.setdefault("within_batch", dict(scores["global"]))
    return directed


def _is_one_batch(groups: dict[str, list[Tensor]]) -> bool:
    """Whether all cells are of one batch."""
    sizes = {scope: [len(group) for group in groups[scope]] for scope in SCOPES}
    return sizes["global"] == sizes["within_batch"] != []


def _rank_pairs(pairs: list[_Pair], ranks: Ranks) -> list[tuple[RankedKeys, RankedKeys]]:
    """Rank the keys of each pair, forward and backward; every rank does a slice of the queries."""
    ranked_here = []
    for x, y in pairs:
        part = ranks.slice_for_rank(len(x))
        ranked_here.append([rank_keys(x, y, part).to_plain(), rank_keys(y, x, part).to_plain()])
    joined = []
    for slices in zip(*ranks.gather_values(ranked_here), strict=True):  # of one pair, by rank
        forward, backward = (
            join_ranked_keys([RankedKeys.from_plain(value) for value in values])
            for values in zip(*slices, strict=True)
        )
        joined.append((forward, backward))
    return joined


def _sum_metrics(pair: _Pair, forward: RankedKeys, backward: RankedKeys) -> np.ndarray:
    """METRICS of both directions, summed over the cells of one group, (2, 3)."""
    n_cells = len(pair[0])
    first_equal = [_find_first_equal(u) for u in pair]
    match = score_matches(forward.nearest, backward.nearest, *first_equal)
    return np.array(
        [
            [ranked.n_nearer / n_cells, n_cells * score, ranked.n_found]
            for ranked, score in zip((forward, backward), match, strict=True)
        ]
    )


def compute_foscttm(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, ranks: Ranks | None = None
) -> float:
    """Eq. 18 over all cells: the share of keys nearer than the true match; 0 is best, 0.5 chance.

    Arguments are those of `compute_nearer_share`.
    """
    return float(compute_nearer_share(u1, u2, ranks).mean())


def compute_nearer_share(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, ranks: Ranks | None = None
) -> np.ndarray:
    """What each pair adds to `compute_foscttm`, the mean of both directions, (N,) float64.

    Args:
        u1: (N, D), N >= 1, on any device; every rank passes the same.
        u2: (N, D).
        ranks: processes that share the queries. All must call, and all get the result.
    """
    ranks = ranks or Ranks()
    x, y = (scale_to_length_one(u) for u in _check_embeddings(u1, u2))
    part = ranks.slice_for_rank(len(x))
    nearer = np.zeros(len(x))
    for queries, keys in ((x, y), (y, x)):
        for rows, distances in compute_distances(queries, keys, part):
            partner = _select_partner(distances, rows)
            nearer[rows.cpu().numpy()] += (distances < partner).sum(1).cpu().numpy()
    counts = ranks.gather_values(nearer[part].tolist())
    return np.concatenate(counts) / (2 * len(x))


def compute_chance(batch: np.ndarray) -> Scores:
    """Compute what embeddings that know nothing score.

    It is a FOSCTTM of 0.5, a match of 1 in n and a recall of 10 in n.

    Args:
        batch: (N,) names or codes.
    """
    chance: Scores = {}
    for scope, groups in _group_cells(batch, "cpu").items():
        sizes = np.array([len(group) for group in groups])
        sums = {"match": np.ones(len(sizes)), "recall10": np.minimum(sizes, _RECALL_AT)}
        chance[scope] = {"foscttm": 0.5} | {
            metric: float(values.sum() / sizes.sum()) if len(sizes) else float("nan")
            for metric, values in sums.items()
        }
    return chance


def rank_keys(queries: Tensor, keys: Tensor, part: slice) -> RankedKeys:
    """Rank all keys for the queries of a slice.

    Of keys at the same distance the one of lowest index counts as the nearer.

    Args:
        queries: (N, D) float64, of length 1.
        keys: (N, D); row i is the partner of query i.
        part: which queries.
    """
    n_nearer, n_found, nearest = 0, 0, [torch.empty(0, dtype=torch.int64)]
    for rows, distances in compute_distances(queries, keys, part):
        partner = _select_partner(distances, rows)
        before = (distances < partner).sum(1)
        n_nearer += int(before.sum())
        tied = ((distances <= partner).sum(1) > before + 1).nonzero()[:, 0]  # few rows, if any
        lower_index = torch.arange(len(keys), device=distances.device) < rows[tied, None]
        before[tied] += ((distances[tied] == partner[tied]) & lower_index).sum(1)
        n_found += int((before < _RECALL_AT).sum())
        nearest.append(distances.argmin(1).cpu())
    return RankedKeys(n_nearer, n_found, torch.cat(nearest).numpy())


def join_ranked_keys(parts: Sequence[RankedKeys]) -> RankedKeys:
    """Join what consecutive slices of queries found."""
    return RankedKeys(
        sum(part.n_nearer for part in parts),
        sum(part.n_found for part in parts),
        np.concatenate([part.nearest for part in parts]),
    )


def score_matches(
    forward: np.ndarray, backward: np.ndarray, first1: np.ndarray, first2: np.ndarray
) -> tuple[float, float]:
    """The competition's matching score of both directions (eq. 16 and 17 with one neighbour).

    Profiles i and j share s of their 4 neighbours: one if i's nearest is j, one if j's nearest is
    i. Their weight is the Jaccard index s / (4 - s), that is 0, 1/3 or 1. Rows of weights are
    normalised to 1, and the score is the mean of the diagonal. A profile is its own nearest
    neighbour inside its modality; one of several equal profiles stands for them all.

    Args:
        forward: (N,), for each profile of the first modality the nearest one of the second.
        backward: (N,), the other way round.
        first1: (N,), for each profile of the first modality the first one that equals it.
        first2: (N,), the same of the second.

    Returns:
        The score of `forward` and of `backward`.
    """
    chosen, choosing = first2[forward], first1[backward]
    return (
        _score_match(chosen, choosing, first1, first2),
        _score_match(choosing, chosen, first2, first1),
    )


def _score_match(
    nearest: np.ndarray, nearest_query: np.ndarray, first_query: np.ndarray, first_key: np.ndarray
) -> float:
    """Eq. 17 of one direction.

    Args:
        nearest: (N,), the key nearest to each query.
        nearest_query: (N,), the query nearest to each key.
        first_query: (N,), the first query that equals each.
        first_key: (N,), the first key that equals each.
    """
    n_cells = len(nearest)
    # How many keys each query points at: 1, or all that are equal.
    n_chosen = np.bincount(first_key, minlength=n_cells)[nearest]
    n_choosing = np.bincount(nearest_query, minlength=n_cells)[first_query]  # keys that point back
    n_mutual = np.where(nearest_query[nearest] == first_query, n_chosen, 0)  # counted in both
    row_sum = (n_chosen + n_choosing - 2 * n_mutual) / 3 + n_mutual
    shared = (nearest == first_key).astype(float) + (nearest_query == first_query)
    return float((shared / (4 - shared) / row_sum).mean())


def _select_partner(distances: Tensor, rows: Tensor) -> Tensor:
    """Distance to the partner, (n, 1).

    It is taken from `distances`, so that what ties in exact arithmetic ties here.
    """
    return distances.gather(1, rows[:, None])


def _group_cells(batch: np.ndarray, device: torch.device | str) -> dict[str, list[Tensor]]:
    """Cells of each group of two or more, by scope."""
    _, code = np.unique(batch, return_inverse=True)
    order = np.argsort(code, kind="stable")
    batches = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
    groups = {"global": [np.arange(len(batch))], "within_batch": batches}
    return {
        scope: [torch.from_numpy(cells).to(device) for cells in groups[scope] if len(cells) >= 2]
        for scope in SCOPES
    }


def _find_first_equal(u: Tensor) -> np.ndarray:
    """For each row the lowest row that equals it, (N,) int64."""
    rows = np.ascontiguousarray(u.cpu().numpy() + 0.0)  # -0.0 equals 0.0, though its bytes do not
    whole = rows.view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def _check_embeddings(u1: np.ndarray | Tensor, u2: np.ndarray | Tensor) -> _Pair:
    """Both embeddings as finite float64 tensors of one shape."""
    x, y = (torch.as_tensor(u).detach().to(torch.float64) for u in (u1, u2))
    if x.ndim != 2 or x.shape != y.shape or not x.numel():
        raise DataError(
            "two embeddings of the same cells are needed",
            got=(tuple(x.shape), tuple(y.shape)),
            expected="(N, D) twice",
        )
    for name, u in (("first", x), ("second", y)):
        bad = int((~u.isfinite()).any(1).sum())
        if bad:
            raise DataError(
                f"the {name} embedding is not finite",
                got=f"{bad} of {len(u)} cells with NaN or Inf",
            )
    return x, y
