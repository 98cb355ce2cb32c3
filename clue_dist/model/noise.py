"""Everything that the model draws at random in one micro-batch, the same on any number of ranks.

Each lane of the global batch has its own generator, keyed by (seed, t, lane) for the global
micro-batch t. A rank draws for its lanes alone and puts the rows into the order of its batch. So
a cell gets the same noise on 1 rank and on 64, and the number of ranks changes rounding and
nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clue_dist.store.shuffle import derive_key

DROPOUT_LEVELS = 256  # a byte decides whether a value is dropped, so rates go in steps of 1/256


class Noise:
    """Draws for the B cells of one rank's micro-batch; calls come in the same order on each rank.

    Args:
        seed: seed of the run.
        micro_batch: t, its number.
        stratum_shares: cells of the global micro-batch by stratum, see `CellPlan.compose_batch`.
        lanes: streams of the global micro-batch.
        rank: number of this rank.
        world: number of ranks.
        device: where to draw. Other devices draw other numbers.
    """

    def __init__(
        self,
        seed: int,
        micro_batch: int,
        stratum_shares: Mapping[str, int],
        lanes: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = device
        shares = tuple(stratum_shares.values())
        self._rounds = [share // lanes for share in shares]  # by stratum
        self._per_lane = sum(self._rounds)
        self._prepare_draws((seed, micro_batch), shares, lanes, rank, world)

    def draw_normal(self, *tail: int) -> Tensor:
        """Standard normal draws, (B, *tail) float32."""
        return self._draw_rows(torch.float32, tail, Tensor.normal_)

    def draw_keys(self) -> Tensor:
        """A random integer of 32 bits for each cell, (B,) int64."""
        return self._draw_rows(
            torch.int64, (), functools.partial(_fill_integers, least=0, beyond=2**32)
        )

    def apply_dropout(self, x: Tensor, rate: float, rows: Tensor | None = None) -> Tensor:
        """Drop values of x, (..., B, F), and scale up the others.

        Args:
            x: the values, or those of some rows of the batch, (..., n, F).
            rate: the share to drop, rounded to 1/256.
            rows: (n,), these rows.
        """
        threshold = round(rate * DROPOUT_LEVELS)
        if threshold == 0:
            return x
        *members, n_rows, width = x.shape
        columns = math.prod(members) * width
        # 1 where a byte reaches the threshold, else 0. Comparisons of bytes take longer on CPUs.
        kept = self._draw_bytes(columns, rows).clamp_(threshold - 1, threshold).sub_(threshold - 1)
        factor = kept.to(x.dtype).mul_(DROPOUT_LEVELS / (DROPOUT_LEVELS - threshold))
        return x * factor.view(n_rows, *members, width).movedim(0, -2)

    def draw_mixing(self) -> tuple[Tensor, Tensor]:
        """Draw for each cell a partner of its stratum and lane, and its own share of the mixture.

        Returns:
            Rows of the partners, (B,) int64, now and then the cell itself, and shares, (B, 1).
        """
        partners, first = [], 0  # by stratum, then by lane
        for rounds in self._rounds:
            partners.append(
                [
                    first + torch.randperm(rounds, generator=g, device=self._device)
                    for g in self._lanes
                ]
            )
            first += rounds
        places = torch.cat(
            [
                torch.cat(of_lane) + i * self._per_lane
                for i, of_lane in enumerate(zip(*partners, strict=True))
            ]
        )
        row_of_place = torch.empty_like(self._order)
        row_of_place[self._order] = torch.arange(len(row_of_place), device=row_of_place.device)
        shares = self._draw_rows(torch.float32, (1,), Tensor.uniform_)
        return row_of_place[places[self._order]], shares

    def draw_subset(self, size: int, total: int) -> Tensor:
        """`size` of range(total), sorted, the same on every rank, (size,) int64."""
        order = torch.randperm(total, generator=self._all_ranks, device=self._device)
        return order[:size].sort().values

    def _draw_bytes(self, columns: int, rows: Tensor | None) -> Tensor:
        """Uniform bytes, (B, columns), or those of `rows`."""
        width = -(-columns // 8)  # eight bytes of a draw from all of int64
        fill = functools.partial(_fill_integers, least=-(2**63), beyond=None)
        return self._draw_rows(torch.int64, (width,), fill, rows).view(torch.uint8)[:, :columns]

    def _prepare_draws(
        self, key: tuple[int, int], shares: tuple[int, ...], lanes: int, rank: int, world: int
    ) -> None:
        """Make a generator for each lane of this rank, and one that is the same on all ranks."""
        self._lanes = [self._make_generator(*key, lane) for lane in range(rank, lanes, world)]
        self._all_ranks = self._make_generator(*key, "all ranks")
        self._order = order_rows(shares, lanes, world, self._device)

    def _make_generator(self, *key: object) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(derive_key(*key) >> 1)

    def _draw_rows(
        self,
        dtype: torch.dtype,
        tail: tuple[int, ...],
        fill: Callable[..., Tensor],
        rows: Tensor | None = None,
    ) -> Tensor:
        """Draw (B, *tail), lane by lane, in the order of the batch's rows; or of some rows.

        Args:
            dtype: of the draws.
            tail: shape of what each cell gets.
            fill: fills a tensor in place, given a generator.
            rows: (n,); None: all of them.
        """
        shape = (len(self._lanes), self._per_lane, *tail)
        drawn = torch.empty(shape, dtype=dtype, device=self._device)
        for lane, generator in zip(drawn, self._lanes, strict=True):
            fill(lane, generator=generator)
        order = self._order if rows is None else self._order[rows]
        return drawn.flatten(0, 1).index_select(0, order)


def _fill_integers(x: Tensor, generator: torch.Generator, least: int, beyond: int | None) -> Tensor:
    return x.random_(least, beyond, generator=generator)


@functools.cache
def order_rows(
    shares: tuple[int, ...], lanes: int, world: int, device: torch.device | str = "cpu"
) -> Tensor:
    """For each row of a rank's batch, where its draw lies among draws laid out lane by lane.

    Args:
        shares: cells of the global micro-batch, by stratum.
        lanes: streams of the global micro-batch.
        world: number of ranks.
        device: where the result lies; it is copied there once, as a copy waits for the device.

    Returns:
        (B,) int64. The rows of a batch come stratum by stratum, those of its lanes by turns.
    """
    rank_lanes, per_lane, first = lanes // world, sum(shares) // lanes, 0
    places = []
    for share in shares:
        row = torch.arange(share // world)
        places.append(row % rank_lanes * per_lane + first // lanes + row // rank_lanes)
        first += share
    return torch.cat(places).to(device)
