"""How well two embeddings of the same cells find each other: FOSCTTM, matching score, recall at 10.

Row i of `u1` and row i of `u2` are one cell, read from two modalities: a pair. Rows are scaled to
length 1 first. All pairs of rows are compared (`partner_ranks`), to the digits of float64, in
memory that is O(N). Ranks share the rows of `u1`, and join what they found.

Only keys that are strictly nearer count against a cell. So an embedding collapsed to one point has
a FOSCTTM of 0, which `match` and `recall10` give away. NaN would have the same, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import DataError
from clue_dist.metrics.integration import mark_labelled_cells
from clue_dist.metrics.partner_ranks import (
    RankedPartners,
    join_ranked_partners,
    rank_partners_both_ways,
)
from clue_dist.neighbours.nearest import scale_to_length_one
from clue_dist.progress import show_progress
from clue_dist.ranks import Ranks

METRICS = ("foscttm", "match", "recall10")
SCOPES = ("global", "within_batch")
DIRECTIONS = ("forward", "backward")
_RECALL_AT = 10

Scores = dict[str, dict[str, float]]  # scope -> metric -> value
_Pair = tuple[np.ndarray, np.ndarray]  # two embeddings (N, D) of the same cells
_RankedPair = tuple[RankedPartners, RankedPartners]  # forward and backward


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
    and batches count by their cells. Batches of one cell are left out, and cells of an unknown
    batch; where no batch is known at all, the cells are of one. A scope without cells has NaN for
    all scores.

    Args:
        u1: (N, D), on any device; every rank passes the same.
        u2: (N, D).
        batch: (N,) names or codes; equal values are one batch, but for "" and "nan", which are
            unknown.
        ranks: processes that share the work. All must call, and all get the result.

    Returns:
        Scores by direction.

    Raises:
        DataError: the shapes do not fit, or values are not finite.
    """
    x, y = _scale_embeddings(u1, u2)
    groups = _group_cells(batch)
    # Of a single batch the second scope is the first.
    scopes = [scope for scope in SCOPES if scope == "global" or not _is_one_batch(groups)]
    all_groups = [cells for scope in scopes for cells in groups[scope]]

    def select_pairs() -> Iterator[_Pair]:
        for cells in all_groups:  # of all cells no copies are made
            yield (x, y) if len(cells) == len(x) else (x[cells], y[cells])

    ranked = _rank_pairs(select_pairs(), ranks or Ranks())
    sums = (_sum_metrics(*pair, *both) for pair, both in zip(select_pairs(), ranked, strict=True))
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


def _is_one_batch(groups: dict[str, list[np.ndarray]]) -> bool:
    """Whether all cells are of one batch."""
    sizes = {scope: [len(group) for group in groups[scope]] for scope in SCOPES}
    return sizes["global"] == sizes["within_batch"] != []


def _rank_pairs(pairs: Iterable[_Pair], ranks: Ranks) -> list[_RankedPair]:
    """Rank partners in each pair, forward and backward; every rank does a slice of the rows."""
    ranked_here = [_rank_slice(x, y, ranks) for x, y in pairs]
    if ranks.world == 1:
        return ranked_here
    plain = [[ranked.to_plain() for ranked in both] for both in ranked_here]
    return [
        (join_ranked_partners(forward), join_ranked_partners(backward))
        for forward, backward in (
            zip(*slices, strict=True)  # of one pair, by rank
            for slices in zip(*ranks.gather_values(plain), strict=True)
        )
    ]


def _rank_slice(x: np.ndarray, y: np.ndarray, ranks: Ranks) -> _RankedPair:
    """Rank what this rank's slice of the rows tells of a pair."""
    part = ranks.slice_for_rank(len(x))
    n_rows = part.stop - part.start
    with show_progress("ranking partners", n_rows, is_shown=ranks.is_first) as progress:
        return rank_partners_both_ways(x, y, part, progress.mark_done)


def _sum_metrics(
    x: np.ndarray, y: np.ndarray, forward: RankedPartners, backward: RankedPartners
) -> np.ndarray:
    """METRICS of both directions, summed over the cells of one group, (2, 3)."""
    first_equal = [_find_first_equal(u) for u in (x, y)]
    match = score_matches(forward.nearest, backward.nearest, *first_equal)
    return np.array(
        [
            [
                ranked.nearer.sum() / len(x),
                len(x) * score,
                (ranked.nearer + ranked.ties < _RECALL_AT).sum(),
            ]
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
        ranks: processes that share the work. All must call, and all get the result.
    """
    pair = _scale_embeddings(u1, u2)
    [(forward, backward)] = _rank_pairs([pair], ranks or Ranks())
    return (forward.nearer + backward.nearer.astype(np.int64)) / (2 * len(forward.nearer))


def compute_chance(batch: np.ndarray) -> Scores:
    """Compute what embeddings that know nothing score.

    It is a FOSCTTM of 0.5, a match of 1 in n and a recall of 10 in n.

    Args:
        batch: (N,) names or codes, as `score_directions` takes them.
    """
    chance: Scores = {}
    for scope, groups in _group_cells(batch).items():
        sizes = np.array([len(group) for group in groups])
        sums = {"match": np.ones(len(sizes)), "recall10": np.minimum(sizes, _RECALL_AT)}
        chance[scope] = {"foscttm": 0.5} | {
            metric: float(values.sum() / sizes.sum()) if len(sizes) else float("nan")
            for metric, values in sums.items()
        }
    return chance


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


def _group_cells(batch: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Cells of each group of two or more, by scope."""
    _, code = np.unique(batch, return_inverse=True)
    order = np.argsort(code, kind="stable")
    known = mark_labelled_cells(batch)
    if known.any():
        order = order[known[order]]
    batches = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
    groups = {"global": [np.arange(len(batch))], "within_batch": batches}
    return {scope: [cells for cells in groups[scope] if len(cells) >= 2] for scope in SCOPES}


def _find_first_equal(u: np.ndarray) -> np.ndarray:
    """For each row the lowest row that equals it, (N,) int64."""
    rows = np.ascontiguousarray(u + 0.0)  # -0.0 equals 0.0, though its bytes do not
    whole = rows.view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def _scale_embeddings(u1: np.ndarray | Tensor, u2: np.ndarray | Tensor) -> _Pair:
    """Both embeddings in float64, rows of length 1; they are finite and of one shape."""
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
    return scale_to_length_one(x).cpu().numpy(), scale_to_length_one(y).cpu().numpy()
