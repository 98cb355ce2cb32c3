"""Everything the model draws at random in one step, so that the world size changes rounding and nothing else.

Each lane of the global batch has its own generator, keyed by (seed, step, lane). A rank draws for its lanes alone
and lays the rows out in the order of its batch, so a cell gets the same noise on 1 rank or on 64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clue_dist.store.shuffle import derive_key


class Noise:
    """Draws for the B cells of one rank's micro-batch; calls must come in the same order on every rank."""

    def __init__(
        self,
        seed: int,
        step: int,
        stratum_shares: Mapping[str, int],
        lanes: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = device
        self._lanes = [self._generator(seed, step, lane) for lane in range(rank, lanes, world)]
        self._shared = self._generator(seed, step, "all ranks")
        self._slots = [n // lanes for n in stratum_shares.values()]
        self._per_lane = sum(self._slots)
        self._order = order_rows(tuple(stratum_shares.values()), lanes, world).to(device)

    def draw_normal(self, *tail: int) -> Tensor:
        """Standard normal draws, (B, *tail) float32."""
        shape = (self._per_lane, *tail)
        return self._rows(
            [torch.randn(shape, generator=g, device=self._device) for g in self._lanes]
        )

    def apply_dropout(self, x: Tensor, rate: float, rows: Tensor | None = None) -> Tensor:
        """Inverted dropout of x: (..., B, F), or (..., n, F) with `rows` (n,) of the batch. The rate goes in steps of
        1/256."""
        threshold = round(rate * 256)
        if threshold == 0:
            return x
        *members, n, width = x.shape
        columns = math.prod(members) * width
        keep = (self._bytes(columns, rows) >= threshold).view(n, *members, width).movedim(0, -2)
        return x * keep * (256 / (256 - threshold))

    def draw_mixing(self) -> tuple[Tensor, Tensor]:
        """For each cell a partner out of its stratum and lane, now and then itself, (B,) int64 rows, and its own share,
        (B, 1)."""
        partner, first = [], 0
        for n in self._slots:
            partner.append(
                [first + torch.randperm(n, generator=g, device=self._device) for g in self._lanes]
            )
            first += n
        in_lane = [
            torch.cat(slots) + i * self._per_lane
            for i, slots in enumerate(zip(*partner, strict=True))
        ]
        own = [torch.rand(self._per_lane, 1, generator=g, device=self._device) for g in self._lanes]
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(len(place), device=place.device)
        return place[self._rows(in_lane)], self._rows(own)

    def draw_subset(self, size: int, of: int) -> Tensor:
        """`size` of range(of), sorted, the same on every rank. (size,) int64."""
        return torch.randperm(of, generator=self._shared, device=self._device)[:size].sort().values

    def _bytes(self, columns: int, rows: Tensor | None) -> Tensor:
        """Uniform bytes, (B, columns), or those of `rows`."""
        width = -(-columns // 4)  # four bytes of a 32-bit draw
        shape = (self._per_lane, width)
        draws = [
            torch.empty(shape, dtype=torch.int32, device=self._device).random_(
                -(2**31), 2**31 - 1, generator=g
            )
            for g in self._lanes
        ]
        bits = self._rows(draws)
        return (bits if rows is None else bits[rows]).view(torch.uint8)[:, :columns]

    def _generator(self, *key: object) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(derive_key(*key) >> 1)

    def _rows(self, draws: list[Tensor]) -> Tensor:
        return torch.cat(draws)[self._order]


_ORDERS: dict[tuple[tuple[int, ...], int, int], Tensor] = {}


def order_rows(share: tuple[int, ...], lanes: int, world: int) -> Tensor:
    """For each row of a rank's batch (stratum by stratum), where it lies in draws laid out (lane, slot). (B,) int64."""
    key = (share, lanes, world)
    if key not in _ORDERS:
        local = lanes // world
        per_lane, first, out = sum(share) // lanes, 0, []
        for n in share:
            i = torch.arange(n // world)
            out.append(i % local * per_lane + first // lanes + i // local)
            first += n
        _ORDERS[key] = torch.cat(out)
    return _ORDERS[key]
