"""How well two embeddings of the same cells find each other: FOSCTTM, the matching score, recall at 10.

Row i of `u1` and row i of `u2` are one cell, seen through two modalities. Rows are L2-normalised first. Distances
are squared Euclidean, float64, made a slice of query rows at a time: memory is O(N), never N x N. Every number is
a sum over query rows, so ranks can share the work: each looks at its slice (`look`), the slices are joined (`join`).

Only strictly nearer profiles count against a cell, so an embedding collapsed to one point has a FOSCTTM of 0, and
so would NaN: the first shows in `match` and `recall10`, the second is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clue_dist.errors import DataError
from clue_dist.ranks import Ranks

METRICS = ("foscttm", "match", "recall10")
SCOPES = ("global", "within_batch")
DIRECTIONS = ("forward", "backward")
_TOP = 10
_SLICE_ELEMENTS = 2**23  # distances held at once: 64 MiB

Scores = dict[str, dict[str, float]]  # scope -> metric -> value


@dataclass(frozen=True)
class RankedKeys:
    """What a slice of n queries sees. nearer: keys nearer than the own partner, summed over the queries;
    found: queries whose partner is among the 10 nearest keys; nearest: (n,) int64, the nearest key of each."""

    nearer: int
    found: int
    nearest: np.ndarray


def compute_scores(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, batch: np.ndarray, ranks: Ranks | None = None
) -> Scores:
    """`{"global": {...}, "within_batch": {...}}` with `foscttm`, `match` and `recall10`, both directions averaged.

    Args and errors as for `directed_scores`.
    """
    return average_directions(score_directions(u1, u2, batch, ranks))


def average_directions(directed: dict[str, Scores]) -> Scores:
    """The mean of both directions."""
    return {
        s: {m: float(np.mean([directed[d][s][m] for d in DIRECTIONS])) for m in METRICS}
        for s in SCOPES
    }


def score_directions(
    u1: np.ndarray | Tensor, u2: np.ndarray | Tensor, batch: np.ndarray, ranks: Ranks | None = None
) -> dict[str, Scores]:
    """The scores of `forward` (row i of u1 looks for row i of u2) and `backward` alone.

    "global" looks among all cells; "within_batch" inside each batch, weighted by cells. Groups of fewer than two
    cells are left out; a scope with no group left is NaN.

    Args:
        u1, u2: (N, D), on any device; every rank passes the same.
        batch: (N,) names or codes; equal values are one batch.
        ranks: the processes to share the queries with; all must call, and all get the result.

    Raises:
        DataError: shapes that do not fit, or values that are not finite.
    """
    ranks = ranks or Ranks()
    x, y = _checked(u1, u2)
    groups = _groups(batch, x.device)
    pairs = [(_l2(x[g]), _l2(y[g])) for scope in SCOPES for g in groups[scope]]
    mine = [
        (
            rank_keys(a, b, ranks.slice_for_rank(len(a))),
            rank_keys(b, a, ranks.slice_for_rank(len(a))),
        )
        for a, b in pairs
    ]
    gathered = ranks.all_gather_object(mine)
    looks = iter(
        [
            tuple(join_ranked_keys(side) for side in zip(*group, strict=True))
            for group in zip(*gathered, strict=True)
        ]
    )
    both = iter(pairs)

    totals = {d: {s: np.zeros(len(METRICS)) for s in SCOPES} for d in DIRECTIONS}
    for scope in SCOPES:
        for _ in groups[scope]:
            (a, b), (forward, backward) = next(both), next(looks)
            n = len(a)
            match = score_matches(
                forward.nearest, backward.nearest, _first_equal(a), _first_equal(b)
            )
            for direction, seen, m in zip(DIRECTIONS, (forward, backward), match, strict=True):
                totals[direction][scope] += [seen.nearer / n, n * m, seen.found]
    cells = {scope: sum(len(g) for g in groups[scope]) or float("nan") for scope in SCOPES}
    return {
        d: {s: dict(zip(METRICS, (totals[d][s] / cells[s]).tolist(), strict=True)) for s in SCOPES}
        for d in DIRECTIONS
    }


def compute_foscttm(u1: np.ndarray | Tensor, u2: np.ndarray | Tensor) -> float:
    """Eq. 18 over all cells: the share of the other modality's cells nearer than the true match, 0 best, 0.5 chance.

    u1, u2: (N, D), N >= 1, on any device; rows are L2-normalised here.
    """
    return float(compute_nearer_share(u1, u2).mean())


def compute_nearer_share(u1: np.ndarray | Tensor, u2: np.ndarray | Tensor) -> np.ndarray:
    """Each pair's share in `foscttm`, the mean of both directions. u1, u2: (N, D). (N,) float64"""
    x, y = (_l2(u) for u in _checked(u1, u2))
    nearer = np.zeros(len(x))
    for queries, keys in ((x, y), (y, x)):
        for rows, d in _distances(queries, keys, slice(None)):
            nearer[rows.cpu().numpy()] += (d < _own(d, rows)).sum(1).cpu().numpy()
    return nearer / (2 * len(x))


def compute_chance(batch: np.ndarray) -> Scores:
    """What embeddings that know nothing get: FOSCTTM 0.5, a match of 1 in n, a recall of 10 in n. batch: (N,)."""
    sizes = {
        scope: np.array([len(g) for g in groups]) for scope, groups in _groups(batch, "cpu").items()
    }
    share = {
        s: {"match": np.ones(len(n)), "recall10": np.minimum(n, _TOP)} for s, n in sizes.items()
    }
    means = {
        s: {m: float(v.sum() / n.sum()) if len(n) else float("nan") for m, v in share[s].items()}
        for s, n in sizes.items()
    }
    return {s: {"foscttm": 0.5, **means[s]} for s in SCOPES}


def rank_keys(queries: Tensor, keys: Tensor, part: slice) -> RankedKeys:
    """What the queries of `part` see among all keys. queries, keys: (N, D) float64, L2-normalised, row i a pair.

    Of keys at the same distance the one of lowest index counts as the nearer.
    """
    nearer, found, nearest = 0, 0, [torch.empty(0, dtype=torch.int64)]
    for rows, d in _distances(queries, keys, part):
        own = _own(d, rows)
        before = (d < own).sum(1)
        nearer += int(before.sum())
        tied = ((d <= own).sum(1) > before + 1).nonzero()[:, 0]  # few rows, if any
        before[tied] += (
            (d[tied] == own[tied]) & (torch.arange(len(keys), device=d.device) < rows[tied, None])
        ).sum(1)
        found += int((before < _TOP).sum())
        nearest.append(d.argmin(1).cpu())
    return RankedKeys(nearer, found, torch.cat(nearest).numpy())


def join_ranked_keys(parts: Sequence[RankedKeys]) -> RankedKeys:
    """The looks of consecutive slices, as one."""
    return RankedKeys(
        sum(p.nearer for p in parts),
        sum(p.found for p in parts),
        np.concatenate([p.nearest for p in parts]),
    )


def score_matches(
    forward: np.ndarray, backward: np.ndarray, first1: np.ndarray, first2: np.ndarray
) -> tuple[float, float]:
    """The competition's matching score (eq. 16-17 with k = 1) of both directions: forward, backward.

    Pair (i, j) shares s of its 4 neighbours: one if i's nearest is j, one if j's nearest is i; its weight is the
    Jaccard index s / (4 - s), i.e. 0, 1/3 or 1. Rows are normalised to 1; the score is the mean of the diagonal.
    A profile is its own nearest neighbour inside its modality; one of several equal profiles stands for them all.

    forward, backward: (N,) nearest profile in the other modality; first1, first2: (N,) first equal profile.
    """
    a, b = first2[forward], first1[backward]
    return _match(a, b, first1, first2), _match(b, a, first2, first1)


def _match(a: np.ndarray, b: np.ndarray, first_query: np.ndarray, first_key: np.ndarray) -> float:
    n = len(a)
    chosen = np.bincount(first_key, minlength=n)[
        a
    ]  # keys that are what query i points at: 1, or all its equals
    choosing = np.bincount(b, minlength=n)[first_query]  # keys that point at query i
    mutual = np.where(b[a] == first_query, chosen, 0)  # keys counted in both
    row_sum = (chosen + choosing - 2 * mutual) / 3 + mutual
    shared = (a == first_key).astype(float) + (b == first_query)
    return float((shared / (4 - shared) / row_sum).mean())


def _distances(queries: Tensor, keys: Tensor, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers (n,) and their distances to all keys (n, N), slice by slice."""
    step = max(1, _SLICE_ELEMENTS // len(keys))
    q_norm, k_norm = (queries**2).sum(1), (keys**2).sum(1)
    start, stop, _ = part.indices(len(queries))
    for lo in range(start, stop, step):
        hi = min(lo + step, stop)
        product = (2 * queries[lo:hi]) @ keys.T
        d = (q_norm[lo:hi, None] + k_norm[None]).sub_(product).clamp_(min=0)
        yield torch.arange(lo, hi, device=d.device), d


def _own(d: Tensor, rows: Tensor) -> Tensor:
    """Distance to the own partner, (n, 1); taken from `d`, so that what ties in exact arithmetic ties here."""
    return d.gather(1, rows[:, None])


def _groups(batch: np.ndarray, device: torch.device | str) -> dict[str, list[Tensor]]:
    """Cells of each group of two or more, by scope."""
    _, code = np.unique(batch, return_inverse=True)
    order = np.argsort(code, kind="stable")
    split = np.split(order, np.flatnonzero(np.diff(code[order])) + 1)
    groups = {"global": [np.arange(len(batch))], "within_batch": split}
    return {
        s: [torch.from_numpy(g).to(device) for g in gs if len(g) >= 2] for s, gs in groups.items()
    }


def _first_equal(u: Tensor) -> np.ndarray:
    """For each row the lowest row that equals it, (N,) int64."""
    rows = np.ascontiguousarray(u.cpu().numpy() + 0.0)  # -0.0 equals 0.0, though its bytes do not
    whole = rows.view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def _l2(u: Tensor) -> Tensor:
    length: Tensor = u.norm(dim=1, keepdim=True)
    return u / length.clamp(min=1e-12)


def _checked(u1: np.ndarray | Tensor, u2: np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
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
