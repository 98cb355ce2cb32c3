"""How far down the list of nearest keys a query's partner comes, counted over all pairs exactly.

Row i of both sets is a pair: the profiles of one cell from two modalities. Of keys at the same
distance the one of lowest index counts as the nearer. Memory is O(N).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from clue_dist.neighbours.distance_kernels import compute_partner_distances, rank_partners
from clue_dist.neighbours.distance_tiles import (
    BoundedPoints,
    Tile,
    bound_points,
    fold_tiles,
)


@dataclass(frozen=True)
class RankedPartners:
    """What some of the keys tell of N queries and their partners."""

    nearer: np.ndarray  # (N,) int32, how many keys are nearer than the partner
    ties: np.ndarray  # (N,) int32, how many are as near as the partner, of a lower index
    nearest: np.ndarray  # (N,) int64, the nearest key, which may be the partner
    least: np.ndarray  # (N,) float64, half the squared distance to it

    def to_plain(self) -> list[str]:
        """Turn it into plain data, as ranks exchange it."""
        fields = (self.nearer, self.ties, self.nearest.astype(np.int32), self.least)
        return [base64.b64encode(field.tobytes()).decode() for field in fields]

    @classmethod
    def from_plain(cls, value: list[str]) -> RankedPartners:
        """Make of it again what `to_plain` turned into plain data."""
        nearer, ties, nearest, least = (
            np.frombuffer(base64.b64decode(text), dtype)
            for text, dtype in zip(value, (np.int32, np.int32, np.int32, np.float64), strict=True)
        )
        return cls(nearer, ties, nearest.astype(np.int64), least)


def join_ranked_partners(parts: Iterable[list[str]]) -> RankedPartners:
    """Join what disjoint sets of keys tell of the same queries.

    Args:
        parts: plain data of `RankedPartners.to_plain`.
    """
    first, *others = (RankedPartners.from_plain(part) for part in parts)
    nearest, least = first.nearest, first.least
    for other in others:
        is_nearer = other.least < least
        is_nearer |= (other.least == least) & (other.nearest < nearest)
        nearest = np.where(is_nearer, other.nearest, nearest)
        least = np.where(is_nearer, other.least, least)
    return RankedPartners(
        first.nearer + sum(other.nearer for other in others),
        first.ties + sum(other.ties for other in others),
        nearest,
        least,
    )


def rank_partners_both_ways(
    first: np.ndarray,
    second: np.ndarray,
    part: slice,
    mark_done: Callable[[int], object] = lambda n_rows: None,
) -> tuple[RankedPartners, RankedPartners]:
    """Rank what rows of a slice of `first` tell of all pairs.

    Each distance is computed once, and serves both directions.

    Args:
        first: (N, D) float64, finite.
        second: (N, D).
        part: which rows of `first` are compared with all rows of `second`.
        mark_done: takes how many more of these rows have been.

    Returns:
        Of `first` as queries, of which those outside `part` have met no key; and of `second` as
        queries, which have met the keys of `part`.
    """
    forward, backward = bound_points(first, second)
    halves = compute_partner_distances(forward.exact, backward.exact)
    directions = [
        _Direction(forward, backward, halves, by_column=False),
        _Direction(backward, forward, halves, by_column=True),
    ]

    def fold_tile(tile: Tile, by_column: bool) -> None:
        directions[by_column].fold_tile(tile)

    fold_tiles(forward, backward, part, fold_tile, both_ways=True, mark_done=mark_done)
    return directions[0].ranked, directions[1].ranked


class _Direction:
    """Ranks the keys of one set for the queries of the other, tile by tile."""

    def __init__(
        self, queries: BoundedPoints, keys: BoundedPoints, halves: np.ndarray, by_column: bool
    ) -> None:
        n_cells = len(halves)
        self._points = queries.exact, keys.exact
        self._by_column = by_column  # whether a tile's columns are the queries
        self._halves = halves
        slack = queries.slack + keys.slack.max(initial=0.0)
        # Rounded down, and up, so that an entry beyond it is beyond what is not rounded.
        below, above = np.float32(-np.inf), np.float32(np.inf)
        self._certain = np.nextafter((halves - 2 * slack).astype(np.float32), below)
        self._limits = np.nextafter(halves.astype(np.float32), above)
        self._reach = self._limits.copy()
        none = np.zeros(n_cells, np.int32)
        self.ranked = RankedPartners(none, none.copy(), np.arange(n_cells), halves.copy())

    def fold_tile(self, tile: Tile) -> None:
        """Count what the keys of a tile tell of its queries."""
        ranked = self.ranked
        limits = (self._certain, self._limits, self._reach, self._halves)
        counts = (ranked.nearer, ranked.ties, ranked.nearest, ranked.least)
        places = (self._by_column, tile.first_query, tile.first_key)
        rank_partners(tile.bounds, *places, *self._points, *limits, *counts)
