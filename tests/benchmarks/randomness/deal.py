"""What a plan deals, and how far that is from independent draws."""

from collections.abc import Mapping

import numpy as np

from clue_dist.data.plan import CellPlan
from tests.benchmarks.randomness.atlas import GROUPS, PLATES, TYPES

Dealt = dict[str, np.ndarray]  # by stratum, the positions of its cells in every batch: (steps, N_s)


def count_steps(plan: CellPlan, passes: int) -> int:
    """Batches until every stratum has been passed through so often."""
    return max(-(-passes * plan.segment_sizes[s] // n) for s, n in plan.stratum_shares.items())


def deal_plan(plan: CellPlan, steps: int) -> Dealt:
    dealt = {s: np.empty((steps, n), np.int32) for s, n in plan.stratum_shares.items()}
    for stratum, cells in dealt.items():
        for t in range(steps):
            cells[t] = plan.select_cells(t, stratum)
    return dealt


def deal_draws(plan: CellPlan, steps: int) -> Dealt:
    """Every pass a shuffle of the whole stratum: the yardstick."""
    rng, dealt = np.random.default_rng(plan.seed), {}
    for stratum, share in plan.stratum_shares.items():
        n, needed = plan.segment_sizes[stratum], steps * share
        passes = [rng.permutation(n).astype(np.int32) for _ in range(-(-needed // n))]
        dealt[stratum] = np.concatenate(passes)[:needed].reshape(steps, share)
    return dealt


def count_not_once(plan: CellPlan, dealt: Dealt) -> int:
    """Cells, over all whole passes, that a pass over their stratum did not deal exactly once."""
    wrong = 0
    for stratum, cells in dealt.items():
        n = plan.segment_sizes[stratum]
        for one in cells.reshape(-1)[: cells.size // n * n].reshape(-1, n):
            wrong += int((np.bincount(one, minlength=n) != 1).sum())
    return wrong


def measure_shares(
    plan: CellPlan, dealt: Dealt, order: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """How plates and types share the batches of a plan, (PLATES + TYPES,) each.

    The variance of a category's cells in a batch, times that of draws without replacement, of which
    mean and variance are known; their correlation between a batch and the next.
    """
    count, mean, variance = (np.zeros(1) for _ in range(3))
    for stratum, cells in dealt.items():
        n, share = plan.segment_sizes[stratum], plan.stratum_shares[stratum]
        p = sum_categories(np.bincount(order[stratum], minlength=GROUPS)) / n
        count = count + sum_categories(count_groups(order[stratum], cells))
        mean = mean + share * p
        variance = variance + share * p * (1 - p) * (n - share) / max(n - 1, 1)  # hypergeometric
    off = count - mean  # (steps, PLATES + TYPES)
    return (off**2).mean(0) / variance, (off[1:] * off[:-1]).mean(0) / (off**2).mean(0)


def count_groups(group: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Cells of each group in every batch, (steps, GROUPS); group: (n,), cells: (steps, N)."""
    steps = len(cells)
    place = np.arange(steps)[:, None] * GROUPS + group[cells]
    return np.bincount(place.reshape(-1), minlength=steps * GROUPS).reshape(steps, GROUPS)


def sum_categories(groups: np.ndarray) -> np.ndarray:
    """(..., GROUPS) -> (..., PLATES + TYPES): sums by plate, then by type."""
    table = groups.reshape(*groups.shape[:-1], PLATES, TYPES)
    return np.concatenate([table.sum(-1), table.sum(-2)], -1)


def count_met_again(plan: CellPlan, dealt: Dealt) -> tuple[float, float] | None:
    """Of the others in a cell's batch, how many are with it in the next pass too, and by chance.

    Of the first stratum, from its first pass to its second; None where there was no second. More
    than chance, as cells of a block stay together in their lane's window.
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
    first, second = (count_pairs(np.bincount(part)) * 2 / n for part in batch)
    return count_pairs(both) * 2 / n, first * second / (n - 1)


def count_pairs(counts: np.ndarray) -> float:
    return float((counts * (counts - 1.0) / 2).sum())
