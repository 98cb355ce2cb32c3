"""Decide which cells a rank sees, and when: a pure function of (seed, t), without state.

The global micro-batch t is the same on 1, 2, 4 or 64 ranks, and rank r of W takes every W-th cell
of it, from the r-th on. Each stratum s that is not rare gives a fixed number N_s of cells to every
micro-batch, and at a step all ranks hold equal shares, so that they run the same graph. Cell j of
these belongs to lane j mod L; the L lanes read from separate blocks, so that ranks do not all
decode the same data. Segments of a stratum (cells that were appended later) share N_s: they take
turns, all lanes at once, in proportion to their sizes.

Strata that are owed less than a round, a cell for every lane, take turns in rounds that they share.
Their shares f_s, in rounds, lie end to end on a line of R shared rounds. Micro-batch t has a round
of the strata at u_t, 1 + u_t, ..., R - 1 + u_t, where u_t is van der Corput's sequence: the bits of
t mirrored at the point. So the turns of a stratum are evenly spread, one of them in any 1 / f_s
micro-batches or so; batches have at most as many compositions as there are shares; and the turns
before t are counted in closed form.

    q = t * N_s + j            place in the endless sequence of passes over the stratum
    pass, o = divmod(q, n_s)   every pass covers the n_s cells exactly once
    span = o // (L * G * B)    L lanes x a window of G blocks x B cells, of this pass's block order
    lane d = o mod L           has one of the span's windows and deals its cells in random order

Blocks come in runs of RUN_BLOCKS, or of a smaller window, whose blocks lie one behind the other
and are read at once. The store is shuffled, so that neighbouring blocks are as random as any two.
Runs begin at other blocks in each pass. A segment's window is as large a part of G as the segment
is of its stratum, so that many segments need no more memory than one. (With turns, L times the
turns before t come on top of t * N_s.)

What is left at the end of a pass (less than one span, with the partly filled last block) is dealt
as one lot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from clue_dist.data.timing import time_phase
from clue_dist.errors import ConfigError
from clue_dist.store.layout import name_stratum
from clue_dist.store.shuffle import derive_key, permute_positions

# A run of one block is a request of its own; a run as long as a window holds nearly the same cells
# in every pass.
RUN_BLOCKS = 8
TURN_BITS = 32  # of u_t: turns repeat after 2^32 micro-batches


@dataclass(frozen=True)
class CellPlan:
    """The cells of every micro-batch.

    Raises:
        ConfigError: the share of a stratum is no multiple of the lanes, or turns add up to no whole
            number of rounds.
    """

    seed: int
    segment_sizes: Mapping[str, int]  # n_s, cells to draw from, by segment
    stratum_shares: Mapping[str, int]  # N_s, cells of a micro-batch, by stratum
    lanes: int  # L
    window_blocks: int  # G, of a stratum with one segment
    block_cells: int  # B
    # f_s, rounds of a micro-batch that a stratum gets in turn with others, on average, beyond N_s.
    # Below 1 each, a whole number together.
    turns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stratum, share in self.stratum_shares.items():
            if share < 0 or share % self.lanes or not (share or self.turns.get(stratum)):
                raise ConfigError(
                    "a stratum's share of the batch does not divide into the lanes",
                    where=stratum,
                    got=f"{share} % {self.lanes} = {share % self.lanes}",
                    expected="a positive multiple of data.lanes",
                )
        if abs(sum(self.turns.values()) - self._shared_rounds) > 1e-6:
            raise ConfigError(
                "strata must take turns in whole rounds",
                got=f"{sum(self.turns.values()):g} rounds",
            )

    @property
    def batch_size(self) -> int:
        """Cells of one global micro-batch."""
        return sum(self.stratum_shares.values()) + self._shared_rounds * self.lanes

    @property
    def mean_shares(self) -> dict[str, float]:
        """Cells of a micro-batch by stratum, on average over micro-batches."""
        return {
            stratum: share + self.turns.get(stratum, 0) * self.lanes
            for stratum, share in self.stratum_shares.items()
        }

    @property
    def segments(self) -> list[str]:
        """Segments in the order in which their cells come in a batch."""
        return [name for stratum in self.stratum_shares for name in self._segments.get(stratum, {})]

    @cached_property
    def _segments(self) -> dict[str, dict[str, int]]:
        """Sizes of the segments of each stratum."""
        strata: dict[str, dict[str, int]] = {}
        for segment, size in self.segment_sizes.items():
            strata.setdefault(name_stratum(segment), {})[segment] = size
        return strata

    @cached_property
    def _stratum_sizes(self) -> dict[str, int]:
        """Cells of each stratum, all its segments together."""
        return {stratum: sum(sizes.values()) for stratum, sizes in self._segments.items()}

    @property
    def _shared_rounds(self) -> int:
        """Rounds of a micro-batch in which strata take turns."""
        return round(sum(self.turns.values()))

    @cached_property
    def _turn_bounds(self) -> dict[str, tuple[int, int]]:
        """Where the share of each stratum lies on the line of shared rounds, in 2^-32 rounds."""
        ends = np.rint(np.cumsum([0.0, *self.turns.values()]) * 2.0**TURN_BITS).astype(int).tolist()
        ends[-1] = self._shared_rounds << TURN_BITS
        return dict(zip(self.turns, pairwise(ends), strict=True))

    def compose_batch(self, micro_batch: int) -> dict[str, int]:
        """Count the cells of each stratum in a micro-batch, the same on any number of ranks."""
        return {
            stratum: self.lanes * self._count_rounds(micro_batch + 1, stratum)
            - self.lanes * self._count_rounds(micro_batch, stratum)
            for stratum in self.stratum_shares
        }

    def _count_rounds(self, micro_batch: int, stratum: str) -> int:
        """Count a stratum's rounds in all micro-batches before `micro_batch`."""
        lower, upper = self._turn_bounds.get(stratum, (0, 0))
        turns = _count_turns(micro_batch, upper) - _count_turns(micro_batch, lower)
        return micro_batch * self.stratum_shares[stratum] // self.lanes + turns

    def _bound_rounds(self, n_batches: int, stratum: str) -> int:
        """The largest number of a stratum's rounds that `n_batches` micro-batches can hold."""
        lower, upper = self._turn_bounds.get(stratum, (0, 0))
        # Of 2^k consecutive u_t, one lies in each 2^k-th part of a round.
        parts = (n_batches - 1).bit_length()
        turns = -(-(upper - lower << parts) >> TURN_BITS) + 1 if upper > lower else 0
        rounds = n_batches * self.stratum_shares[stratum] // self.lanes
        return rounds + min(turns, n_batches)

    def count_copies(self, stratum: str) -> int:
        """Count how often a cell of a stratum stands in one micro-batch, at most.

        Each lane takes a cell of a stratum, so that one of fewer cells fills its share with copies.
        """
        cells = self._bound_rounds(1, stratum) * self.lanes
        return -(-cells // self._stratum_sizes[stratum])

    def count_dealt_cells(self, micro_batch: int, segment: str) -> int:
        """Count a segment's cells in all micro-batches before `micro_batch`.

        The lanes take whole rounds. A segment with fewer cells than lanes fills a round with
        copies of its cells.
        """
        stratum = name_stratum(segment)
        rounds = self._count_rounds(micro_batch, stratum)
        cells = self._stratum_sizes[stratum]
        for name, size in self._segments[stratum].items():
            segment_rounds = rounds * size // cells
            if name == segment:
                return segment_rounds * self.lanes
            # The segments behind this one share what is left.
            rounds, cells = rounds - segment_rounds, cells - size
        raise KeyError(segment)

    def bound_dealt_cells(self, segment: str, n_batches: int) -> int:
        """The largest number of a segment's cells that `n_batches` micro-batches can hold."""
        stratum = name_stratum(segment)
        rounds = self._bound_rounds(n_batches, stratum)
        share = rounds * self.segment_sizes[segment] // self._stratum_sizes[stratum]
        turns = len(self._segments[stratum])  # the share is rounded at each segment's turn
        return min(share + turns, rounds) * self.lanes

    @time_phase("plan")
    def select_cells(self, micro_batch: int, segment: str, n_batches: int = 1) -> np.ndarray:
        """Select a segment's cells of consecutive micro-batches; rank r of W takes [r::W] of each.

        Args:
            micro_batch: number of the first micro-batch.
            segment: its name.
            n_batches: how many micro-batches.

        Returns:
            Positions in the segment, int64, of one micro-batch behind the other. All segments of a
            stratum together give as many positions to a micro-batch as `compose_batch` says.
        """
        size = self.segment_sizes[segment]
        first = self.count_dealt_cells(micro_batch, segment)
        last = self.count_dealt_cells(micro_batch + n_batches, segment)
        places = np.arange(first, last, dtype=np.int64)
        positions = np.empty(len(places), np.int64)
        for number in np.unique(places // size).tolist():
            inside = places // size == number
            positions[inside] = self._order_pass(segment, number, places[inside] - number * size)
        return positions

    def count_window_blocks(self, segment: str) -> int:
        """Count the blocks of a segment that a lane mixes at a time."""
        stratum_size = self._stratum_sizes[name_stratum(segment)]
        return max(1, self.window_blocks * self.segment_sizes[segment] // stratum_size)

    def _order_pass(self, segment: str, number: int, offsets: np.ndarray) -> np.ndarray:
        """Positions in the segment of the cells at `offsets` of pass `number`."""
        size, lanes, block_cells = self.segment_sizes[segment], self.lanes, self.block_cells
        window_blocks = self.count_window_blocks(segment)
        full_blocks, run = size // block_cells, min(RUN_BLOCKS, window_blocks)
        span = lanes * window_blocks * block_cells
        spanned = full_blocks * block_cells // span * span  # cells dealt in whole spans
        key = derive_key(self.seed, segment, number)
        positions = np.empty(len(offsets), np.int64)

        inside = offsets < spanned
        number_of_span, place = np.divmod(offsets[inside], span)
        window = number_of_span * lanes + place % lanes  # windows are numbered in block order
        cell = _shuffle_windows(place // lanes, window, window_blocks * block_cells, key)
        block = _order_blocks(window * window_blocks + cell // block_cells, full_blocks, run, key)
        positions[inside] = block * block_cells + cell % block_cells

        rest = size - spanned
        if rest:
            cell = permute_positions(offsets[~inside] - spanned, rest, key + 1)
            block = spanned // block_cells + cell // block_cells
            full = block < full_blocks  # the partly filled block keeps its place at the end
            block[full] = _order_blocks(block[full], full_blocks, run, key)
            positions[~inside] = block * block_cells + cell % block_cells
        return positions


# Strata share bounds, and the loader counts first what training asks for.
@lru_cache(maxsize=1 << 14)
def _count_turns(micro_batch: int, bound: int) -> int:
    """Count the points i + u_t below a bound, of all micro-batches t before `micro_batch`.

    Args:
        micro_batch: how many micro-batches.
        bound: a place on the line of shared rounds, in 2^-32 rounds.
    """
    rounds, rest = bound >> TURN_BITS, bound & ((1 << TURN_BITS) - 1)
    # u_t lies below `rest` if its first bits are those of `rest`, and its next is 0 for a 1. These
    # are the last bits of t: `residue`, of a number of `bit` + 1 bits.
    count, residue = rounds * micro_batch, 0
    for bit in range(TURN_BITS if rest else 0):
        if rest >> (TURN_BITS - 1 - bit) & 1:
            count += (micro_batch - 1 - residue) // (2 << bit) + 1
            residue += 1 << bit
    return count


def _order_blocks(places: np.ndarray, full_blocks: int, run: int, key: int) -> np.ndarray:
    """The blocks at `places` of a pass.

    Whole runs are shuffled. Then all blocks move on by as many places, round the end, so that the
    blocks too few for a run are other ones in each pass.
    """
    if not len(places):
        return places
    runs = full_blocks // run
    number, offset = np.divmod(places, run)
    whole = number < runs
    blocks = places.copy()
    blocks[whole] = permute_positions(number[whole], runs, key) * run + offset[whole]
    return (blocks + key % full_blocks) % full_blocks


def _shuffle_windows(
    places: np.ndarray, windows: np.ndarray, window_cells: int, key: int
) -> np.ndarray:
    """The cell at each place of a window; every window has a shuffle of its own."""
    distinct, which = np.unique(windows, return_inverse=True)
    keys = np.array([derive_key(key, window) for window in distinct.tolist()], np.uint64)
    return permute_positions(places, window_cells, keys[which])
