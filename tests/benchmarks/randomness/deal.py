"""What a plan deals, and how far that is from independent draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clue_dist.data.plan import CellPlan
from tests.benchmarks.randomness.atlas import PLATES, TYPES

Dealt = dict[
    str, np.ndarray
]  # of each stratum, the positions of its cells in every batch: (steps, N_s) int32


def steps_for(plan: CellPlan, passes: int) -> int:
    """Batches until every stratum has been passed through so often."""
    return max(-(-passes * plan.segment_sizes[s] // n) for s, n in plan.stratum_shares.items())


def by_plan(plan: CellPlan, steps: int) -> Dealt:
    out = {s: np.empty((steps, n), np.int32) for s, n in plan.stratum_shares.items()}
    for stratum, cells in out.items():
        for t in range(steps):
            cells[t] = plan.select_cells(t, stratum)
    return out


def by_draws(plan: CellPlan, steps: int) -> Dealt:
    """Every pass a shuffle of the whole stratum: the yardstick."""
    rng = np.random.default_rng(plan.seed)
    out = {}
    for s, share in plan.stratum_shares.items():
        n, needed = plan.segment_sizes[s], steps * share
        passes = [rng.permutation(n).astype(np.int32) for _ in range(-(-needed // n))]
        out[s] = np.concatenate(passes)[:needed].reshape(steps, share)
    return out


def not_once(plan: CellPlan, dealt: Dealt) -> int:
    """Cells, summed over all whole passes, that a pass over their stratum did not deal exactly once."""
    wrong = 0
    for stratum, cells in dealt.items():
        n = plan.segment_sizes[stratum]
        for one in cells.reshape(-1)[: cells.size // n * n].reshape(-1, n):
            wrong += int((np.bincount(one, minlength=n) != 1).sum())
    return wrong


@dataclass(frozen=True)
class Shares:
    """How plates and types share the batches of one plan, (PLATES + TYPES,) each.

    variance: of a category's cells in a batch, times that of draws without replacement; neighbours: their correlation
    between a batch and the next.
    """

    variance: np.ndarray
    neighbours: np.ndarray


def shares_of(plan: CellPlan, dealt: Dealt, stored: Mapping[str, np.ndarray]) -> Shares:
    """stored: groups of each stratum's cells, see `atlas.stored`. Means and variances are the known ones of a draw."""
    count, mean, variance = (np.zeros(1) for _ in range(3))
    for stratum, cells in dealt.items():
        n, share = plan.segment_sizes[stratum], plan.stratum_shares[stratum]
        p = categories(np.bincount(stored[stratum], minlength=PLATES * TYPES)) / n
        count = count + categories(composition(stored[stratum], cells))  # (steps, PLATES + TYPES)
        mean = mean + share * p
        variance = variance + share * p * (1 - p) * (n - share) / max(n - 1, 1)  # hypergeometric
    off = count - mean
    return Shares((off**2).mean(0) / variance, (off[1:] * off[:-1]).mean(0) / (off**2).mean(0))


def composition(group: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Cells of each group in every batch. group: (n,); cells: (steps, N); returns (steps, PLATES * TYPES)."""
    steps, groups = len(cells), PLATES * TYPES
    place = np.arange(steps)[:, None] * groups + group[cells]
    return np.bincount(place.reshape(-1), minlength=steps * groups).reshape(steps, groups)


def categories(groups: np.ndarray) -> np.ndarray:
    """(..., PLATES * TYPES) -> (..., PLATES + TYPES): sums by plate, then by type."""
    table = groups.reshape(*groups.shape[:-1], PLATES, TYPES)
    return np.concatenate([table.sum(-1), table.sum(-2)], -1)


def met_again(plan: CellPlan, dealt: Dealt) -> tuple[float, float] | None:
    """Of the others in a cell's batch, how many are with it in the next pass too, and how many by chance would be.

    Of the first stratum, from its first pass to its second; None where there was no second. More than chance, as cells
    of a block stay together in their lane's window.
    """
    stratum, cells = next(iter(dealt.items()))
    n, share = plan.segment_sizes[stratum], plan.stratum_shares[stratum]
    if cells.size < 2 * n:
        return None
    batch = np.empty((2, n), np.int64)  # of each cell in each of two passes
    for number in range(2):
        q = np.arange(number * n, (number + 1) * n)
        batch[number, cells.reshape(-1)[q]] = q // share
    both = np.unique(batch[0] * (batch[1].max() + 1) + batch[1], return_counts=True)[1]
    met = [pairs(np.bincount(of)) * 2 / n for of in batch]  # others in its batch, in each pass
    return pairs(both) * 2 / n, met[0] * met[1] / (n - 1)


def pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1.0) / 2).sum())
