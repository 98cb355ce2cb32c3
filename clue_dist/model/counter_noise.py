"""The noise of a micro-batch on a GPU: every draw is one launch, instead of one for each lane."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from clue_dist.model.fused import can_fuse
from clue_dist.model.noise import Noise
from clue_dist.store.shuffle import derive_key

ALL_RANKS = -1  # number of the cell whose draws every rank makes


class NumberedCells(NamedTuple):
    """The B rows of a rank's batch, numbered alike on any number of ranks."""

    cell: Tensor  # (B,) int32, number in the global batch, lane by lane
    group: Tensor  # (B,) int64, number of the cell's stratum and lane
    by_group: Tensor  # (B,) int64, the rows sorted by group, and in their order within


class CounterNoise(Noise):
    """Draws of a counter-based generator keyed by seed, micro-batch, draw, and lane and row.

    Arguments are those of `Noise`. Draws are other ones than on a CPU.
    """

    def draw_normal(self, *tail: int) -> Tensor:
        """Standard normal draws, (B, *tail) float32."""
        return self._draw("normal", self._numbered.cell, math.prod(tail)).unflatten(1, tail)

    def draw_keys(self) -> Tensor:
        """A random integer of 32 bits for each cell, (B,) int64."""
        return self._draw("integers", self._numbered.cell, 1)[:, 0].long() & 0xFFFFFFFF

    def draw_mixing(self) -> tuple[Tensor, Tensor]:
        """Draw for each cell a partner of its stratum and lane, and its own share of the mixture.

        Returns:
            Rows of the partners, (B,) int64, now and then the cell itself, and shares, (B, 1).
        """
        _, group, by_group = self._numbered
        shuffled = (group << 32 | self.draw_keys()).argsort(stable=True)  # in each group
        partner = torch.empty_like(by_group).index_copy(0, by_group, shuffled)
        return partner, self._draw("uniform", self._numbered.cell, 1)

    def draw_subset(self, size: int, total: int) -> Tensor:
        """`size` of range(total), sorted, the same on every rank, (size,) int64."""
        nobody = torch.full_like(self._numbered.cell[:1], ALL_RANKS)
        order = self._draw("integers", nobody, total)[0].argsort(stable=True)
        return order[:size].sort().values

    def _prepare_draws(
        self, key: tuple[int, int], shares: tuple[int, ...], lanes: int, rank: int, world: int
    ) -> None:
        """Number the cells; generators are not needed."""
        self._key, self._draws = derive_key(*key, "counter") >> 1, 0
        self._numbered = number_cells(shares, lanes, rank, world, self._device)

    def _draw_bytes(self, columns: int, rows: Tensor | None) -> Tensor:
        cells = self._numbered.cell if rows is None else self._numbered.cell[rows]
        words = self._draw("integers", cells, -(-columns // 4))
        return words.view(torch.uint8)[:, :columns]

    def _draw(self, kind: str, cells: Tensor, width: int) -> Tensor:
        from clue_dist.model.fused.counter_draws import draw_for_cells

        self._draws += 1
        return draw_for_cells(kind, cells, width, self._key, self._draws)


@functools.cache
def number_cells(
    shares: tuple[int, ...], lanes: int, rank: int, world: int, device: torch.device | str
) -> NumberedCells:
    """Number the cells of a rank's batch; the result lies on the device.

    Args:
        shares: cells of the global micro-batch, by stratum.
        lanes: streams of the global micro-batch.
        rank: number of this rank.
        world: number of ranks.
        device: this rank's.
    """
    rank_lanes, per_lane, first = lanes // world, sum(shares) // lanes, 0
    cells, groups = [], []
    for stratum, share in enumerate(shares):
        row = torch.arange(share // world)
        lane = rank + row % rank_lanes * world
        cells.append(lane * per_lane + first // lanes + row // rank_lanes)
        groups.append(stratum * lanes + lane)
        first += share
    group = torch.cat(groups)
    by_group = group.argsort(stable=True)
    return NumberedCells(torch.cat(cells).int().to(device), group.to(device), by_group.to(device))


def choose_noise(tensor: Tensor) -> type[Noise]:
    """Choose the noise for the device on which a tensor lies."""
    return CounterNoise if can_fuse(tensor) else Noise
