"""Which cells, when: a pure function of (seed, step). No state, no file, no rank.

The global micro-batch of step t is the same on 1, 2, 4 or 64 ranks; a rank takes every W-th cell of it. Each
stratum s gives a fixed number N_s of cells to every micro-batch, so shapes are static and every rank runs the same
graph. Cell j of the stratum's share belongs to lane j mod L; the L lanes read from separate blocks, so that ranks
do not all decode the same data. Segments of a stratum, cells that were appended later, share N_s: they take turns,
lane by lane in step, in proportion to their sizes.

    q = t * N_s + j            place in the endless sequence of passes over the stratum
    pass, o = divmod(q, n_s)   every pass covers the n_s cells exactly once
    span = o // (L * G * B)    L lanes x a window of G blocks x B cells, in this pass's random order of blocks
    lane d = o mod L           owns one of the span's windows and deals its cells in random order

Blocks come in runs, RUN_BLOCKS or a smaller window, that lie one behind the other and are read at once: the store is
shuffled, so that they are as random as any. Where runs begin is another block in each pass. A segment's window is as
large a part of G as the segment is of its stratum, so that many segments need no more memory than one.

What is left at the end of a pass (less than one span, the partly filled last block in it) is dealt as one lot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clue_dist.data.timing import time_phase
from clue_dist.errors import ConfigError
from clue_dist.store.layout import name_stratum
from clue_dist.store.shuffle import derive_key, permute_positions

RUN_BLOCKS = (
    8  # one alone is a request of its own; a whole window is nearly the same cells in every pass
)


@dataclass(frozen=True)
class CellPlan:
    """seed; sizes: cells to draw from per segment of a stratum, {name: n_s}; share: {stratum: N_s}, each a multiple of
    lanes."""

    seed: int
    segment_sizes: Mapping[str, int]
    stratum_shares: Mapping[str, int]
    lanes: int
    window_blocks: int
    block_cells: int

    def __post_init__(self) -> None:
        for name, n in self.stratum_shares.items():
            if n <= 0 or n % self.lanes:
                raise ConfigError(
                    "a stratum's share of the batch does not divide into the lanes",
                    where=name,
                    got=f"{n} % {self.lanes} = {n % self.lanes}",
                    expected="a positive multiple of data.lanes",
                )

    @property
    def batch_size(self) -> int:
        """Cells of one global micro-batch."""
        return sum(self.stratum_shares.values())

    @property
    def segments(self) -> list[str]:
        """In the order in which their cells come in a batch."""
        return [name for stratum in self.stratum_shares for name in self._segments.get(stratum, {})]

    @cached_property
    def _segments(self) -> dict[str, dict[str, int]]:
        """Sizes of the segments of each stratum."""
        out: dict[str, dict[str, int]] = {}
        for name, n in self.segment_sizes.items():
            out.setdefault(name_stratum(name), {})[name] = n
        return out

    @cached_property
    def _cells(self) -> dict[str, int]:
        """Of all segments of each stratum."""
        return {stratum: sum(sizes.values()) for stratum, sizes in self._segments.items()}

    def count_dealt_cells(self, step: int, segment: str) -> int:
        """Cells of a segment in all micro-batches before `step`: whole rounds of the lanes. One that has fewer cells
        than there are lanes gives copies to a round."""
        stratum = name_stratum(segment)
        rounds, cells = step * self.stratum_shares[stratum] // self.lanes, self._cells[stratum]
        for name, n in self._segments[stratum].items():
            own = rounds * n // cells
            if name == segment:
                return own * self.lanes
            rounds, cells = rounds - own, cells - n  # the others share what is left
        raise KeyError(segment)

    def bound_dealt_cells(self, segment: str, steps: int) -> int:
        """Cells of a segment in any `steps` micro-batches, at most."""
        stratum = name_stratum(segment)
        rounds = steps * self.stratum_shares[stratum] // self.lanes
        turns = len(self._segments[stratum])  # each is rounded
        own = rounds * self.segment_sizes[segment] // self._cells[stratum] + turns
        return min(own, rounds) * self.lanes

    @time_phase("plan")
    def select_cells(self, step: int, segment: str, steps: int = 1) -> np.ndarray:
        """Positions in a segment of its cells in micro-batch `step`, int64; rank r of W takes [r::W]. (N_s,) where the
        stratum has one segment; all segments of a stratum together give N_s. steps: of so many, one behind the other.
        """
        n = self.segment_sizes[segment]
        q = np.arange(
            self.count_dealt_cells(step, segment),
            self.count_dealt_cells(step + steps, segment),
            dtype=np.int64,
        )
        out = np.empty(len(q), np.int64)
        for number in np.unique(q // n).tolist():
            here = q // n == number
            out[here] = self._of_pass(segment, number, q[here] - number * n)
        return out

    def count_window_blocks(self, segment: str) -> int:
        """Blocks of a segment that a lane mixes at a time."""
        return max(
            1,
            self.window_blocks * self.segment_sizes[segment] // self._cells[name_stratum(segment)],
        )

    def _of_pass(self, segment: str, number: int, o: np.ndarray) -> np.ndarray:
        n, size, lanes, blocks = (
            self.segment_sizes[segment],
            self.block_cells,
            self.lanes,
            self.count_window_blocks(segment),
        )
        full_blocks, run = n // size, min(RUN_BLOCKS, blocks)
        span = lanes * blocks * size
        spans = full_blocks * size // span
        order = derive_key(self.seed, segment, number)
        out = np.empty(len(o), np.int64)

        inside = o < spans * span
        lot, r = o[inside] // span, o[inside] % span
        window = lot * lanes + r % lanes  # in this pass's order
        i = _by_key(r // lanes, window, blocks * size, order)
        out[inside] = _block(window * blocks + i // size, full_blocks, run, order) * size + i % size

        rest = n - spans * span
        if rest:
            i = permute_positions(o[~inside] - spans * span, rest, order + 1)
            block = spans * lanes * blocks + i // size
            full = block < full_blocks  # the partly filled block keeps its place at the end
            block[full] = _block(block[full], full_blocks, run, order)
            out[~inside] = block * size + i % size
        return out


def _block(i: np.ndarray, full_blocks: int, run: int, order: int) -> np.ndarray:
    """The block at place `i` of a pass: runs are shuffled, then all blocks moved on by as many places, round the end,
    so that those too few for a run are others in each pass."""
    if not len(i):
        return i
    runs = full_blocks // run
    which, k = np.divmod(i, run)
    whole = which < runs
    i = i.copy()
    i[whole] = permute_positions(which[whole], runs, order) * run + k[whole]
    return (i + order % full_blocks) % full_blocks


def _by_key(i: np.ndarray, window: np.ndarray, n: int, key: int) -> np.ndarray:
    """Element `i` of each window's own shuffle of range(n)."""
    windows, which = np.unique(window, return_inverse=True)
    return permute_positions(
        i, n, np.array([derive_key(key, w) for w in windows.tolist()], np.uint64)[which]
    )


def share_slots(batch_size: int, lanes: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Cells of each stratum in a batch: multiples of `lanes`, at least one each, as near the weights as can be.

    Raises:
        ConfigError: the batch has fewer slots than there are strata.
    """
    slots = batch_size // lanes
    if slots < len(weights):
        raise ConfigError(
            "the batch is too small for the strata of this store",
            got=f"{batch_size} cells / {lanes} lanes = {slots} slots for {len(weights)} strata",
            fix=f"--set data.batch_size={lanes * len(weights)} or more",
        )
    total = sum(weights.values())
    exact = {s: w / total * slots for s, w in weights.items()}
    out = {s: max(1, int(x)) for s, x in exact.items()}
    while sum(out.values()) > slots:
        out[max(out, key=lambda s: out[s] - exact[s] if out[s] > 1 else -np.inf)] -= 1
    while sum(out.values()) < slots:
        out[max(out, key=lambda s: exact[s] - out[s])] += 1
    return {s: n * lanes for s, n in out.items()}


def weigh_strata(
    sizes: Mapping[str, int], paired: Mapping[str, bool], paired_share: float | str, batch_size: int
) -> dict[str, float]:
    """Weights of strata: `paired_share` of the batch to paired strata, by number of cells inside each group.

    "auto" gives paired cells twice the share they have of the data, between a half and four fifths, but at most half
    of them to a batch: the contrastive term would take copies of a cell for other cells.
    """
    pairs = sum(n for s, n in sizes.items() if paired[s])
    single = sum(n for s, n in sizes.items() if not paired[s])
    if not pairs or not single:
        return {s: float(n) for s, n in sizes.items()}
    if paired_share == "auto":
        paired_share = min(max(2 * pairs / (pairs + single), 0.5), 0.8, pairs / 2 / batch_size)
    share = float(paired_share)
    if not 0 < share < 1:
        raise ConfigError("data.paired_share must lie between 0 and 1", got=paired_share)
    return {
        s: n / pairs * share if paired[s] else n / single * (1 - share) for s, n in sizes.items()
    }
