"""Which cells, when: a pure function of (seed, step). No state, no file, no rank.

The global micro-batch of step t is the same on 1, 2, 4 or 64 ranks; a rank takes every W-th cell of it. Each
stratum s gives a fixed number N_s of cells to every micro-batch, so shapes are static and every rank runs the same
graph. Cell j of the stratum's share belongs to lane j mod L; the L lanes read from separate blocks, so that ranks
do not all decode the same data. Segments of a stratum, cells that were appended later, share N_s: they take turns,
lane by lane in step, in proportion to their sizes.

    q = t * N_s + j            place in the endless sequence of passes over the stratum
    pass, o = divmod(q, n_s)   every pass covers the n_s cells exactly once
    span = o // (L * G * B)    L lanes x a window of G blocks x B cells, in this pass's random order of windows
    lane d = o mod L           owns one of the span's windows and deals its cells in random order

A window is G blocks one behind the other, which are read at once: the store is shuffled, so that they are as random as
any. Where the first one begins is another block in each pass.

What is left at the end of a pass (less than one span, the partly filled last block in it) is dealt as one lot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clue_dist.data.phases import phase
from clue_dist.errors import ConfigError
from clue_dist.store.layout import group_of
from clue_dist.store.shuffle import key_of, permute


@dataclass(frozen=True)
class Plan:
    """seed; sizes: cells to draw from per segment of a stratum, {name: n_s}; share: {stratum: N_s}, each a multiple of
    lanes."""

    seed: int
    sizes: Mapping[str, int]
    share: Mapping[str, int]
    lanes: int
    window_blocks: int
    block_cells: int

    def __post_init__(self) -> None:
        for name, n in self.share.items():
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
        return sum(self.share.values())

    @property
    def segments(self) -> list[str]:
        """In the order in which their cells come in a batch."""
        return [name for stratum in self.share for name in self._segments(stratum)]

    def _segments(self, stratum: str) -> dict[str, int]:
        return {name: n for name, n in self.sizes.items() if group_of(name) == stratum}

    def dealt(self, step: int, segment: str) -> int:
        """Cells of a segment in all micro-batches before `step`: whole rounds of the lanes. One that has fewer cells
        than there are lanes gives copies to a round."""
        stratum = group_of(segment)
        rounds, cells = step * self.share[stratum] // self.lanes, sum(self._segments(stratum).values())
        for name, n in self._segments(stratum).items():
            own = rounds * n // cells
            if name == segment:
                return own * self.lanes
            rounds, cells = rounds - own, cells - n  # the others share what is left
        raise KeyError(segment)

    def most(self, segment: str, steps: int) -> int:
        """Cells of a segment in any `steps` micro-batches, at most."""
        stratum, segments = group_of(segment), self._segments(group_of(segment))
        rounds = steps * self.share[stratum] // self.lanes
        own = rounds * segments[segment] // sum(segments.values()) + len(segments)  # each turn before it is rounded
        return min(own, rounds) * self.lanes

    @phase("plan")
    def cells(self, step: int, segment: str, steps: int = 1) -> np.ndarray:
        """Positions in a segment of its cells in micro-batch `step`, int64; rank r of W takes [r::W]. (N_s,) where the
        stratum has one segment; all segments of a stratum together give N_s. steps: of so many, one behind the other.
        """
        n, size, lanes = self.sizes[segment], self.block_cells, self.lanes
        q = np.arange(self.dealt(step, segment), self.dealt(step + steps, segment), dtype=np.int64)
        out = np.empty(len(q), np.int64)
        for number in np.unique(q // n).tolist():
            here = q // n == number
            out[here] = self._of_pass(segment, number, q[here] - number * n, n, size, lanes)
        return out

    def _of_pass(self, segment: str, number: int, o: np.ndarray, n: int, size: int, lanes: int) -> np.ndarray:
        full_blocks = n // size
        span = lanes * self.window_blocks * size
        spans = full_blocks * size // span
        order = key_of(self.seed, segment, number)
        out = np.empty(len(o), np.int64)

        inside = o < spans * span
        lot, r = o[inside] // span, o[inside] % span
        window = lot * lanes + r % lanes  # in this pass's order
        i = _by_key(r // lanes, window, self.window_blocks * size, order)
        block = self._block(window * self.window_blocks + i // size, full_blocks, order)
        out[inside] = block * size + i % size

        rest = n - spans * span
        if rest:
            i = permute(o[~inside] - spans * span, rest, order + 1)
            block = spans * lanes * self.window_blocks + i // size
            full = block < full_blocks  # the partly filled block keeps its place at the end
            block[full] = self._block(block[full], full_blocks, order)
            out[~inside] = block * size + i % size
        return out

    def _block(self, i: np.ndarray, full_blocks: int, order: int) -> np.ndarray:
        """The block at place `i` of a pass: windows are shuffled, then all blocks moved on by as many places, round the
        end, so that those too few for a window are others in each pass."""
        if not len(i):
            return i
        windows = full_blocks // self.window_blocks
        window, k = np.divmod(i, self.window_blocks)
        whole = window < windows
        i = i.copy()
        i[whole] = permute(window[whole], windows, order) * self.window_blocks + k[whole]
        return (i + order % full_blocks) % full_blocks


def _by_key(i: np.ndarray, window: np.ndarray, n: int, key: int) -> np.ndarray:
    """Element `i` of each window's own shuffle of range(n)."""
    windows, which = np.unique(window, return_inverse=True)
    return permute(i, n, np.array([key_of(key, w) for w in windows.tolist()], np.uint64)[which])


def shares(batch_size: int, lanes: int, weights: Mapping[str, float]) -> dict[str, int]:
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


def weights(
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
    return {s: n / pairs * share if paired[s] else n / single * (1 - share) for s, n in sizes.items()}
