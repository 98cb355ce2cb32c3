"""What is logged of training: means over ranks and over the steps since the last reading."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.saver import Saver
from clue_dist.data.loader import Loader
from clue_dist.train.setup import Setup
from clue_dist.train.step import compute_learning_rate


class Meter:
    """Loss terms, speed, shares of the time that training waited for data and for saving.

    Every rank must make the same calls at the same steps. before: what `so_far` said as the run was saved.
    """

    def __init__(
        self,
        setup: Setup,
        loader: Loader,
        saver: Saver,
        device: torch.device,
        before: Mapping[str, float],
    ) -> None:
        self._setup, self._loader, self._saver, self._device = setup, loader, saver, device
        self._restart(before)

    def _restart(self, before: Mapping[str, float]) -> None:
        self._sums = {
            k: torch.tensor(v, dtype=torch.float64, device=self._device) for k, v in before.items()
        }
        self._added = int(self._sums.pop("steps", torch.tensor(0)))
        self._steps = 0
        self._since, self._waited, self._held = (
            time.perf_counter(),
            self._loader.waited_seconds,
            self._saver.waited,
        )

    def add(self, terms: dict[str, Tensor], skipped: bool) -> None:
        """The terms of a step; those of one that was skipped mean nothing."""
        self._steps += 1
        if skipped:
            return
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._added += 1

    def so_far(self) -> dict[str, float]:
        """Sums over the steps since the last reading, and how many they are: the mean over ranks, to go on from."""
        return self._over_ranks(1) | {"steps": self._added} if self._sums else {}

    def read(self, step: int) -> dict[str, float]:
        """What happened up to `step`; begins anew."""
        means = self._over_ranks(self._added)
        seconds = time.perf_counter() - self._since
        means["epoch"] = self._setup.count_epochs(step)
        means["lr"] = compute_learning_rate(self._setup, step - 1)
        means["cells_per_s"] = self._steps * int(self._setup.config.data.batch_size) / seconds
        means["data_wait"] = (self._loader.waited_seconds - self._waited) / seconds
        means["saving_wait"] = (self._saver.waited - self._held) / seconds
        if self._device.type == "cuda":
            means["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._restart({})
        return means

    def _over_ranks(self, steps: int) -> dict[str, float]:
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / steps
        dist.all_reduce(means)
        return dict(zip(self._sums, (means / dist.get_world_size()).tolist(), strict=True))
