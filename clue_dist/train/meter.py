"""What is logged of training: means over ranks and over the steps since the last reading."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.data.loader import Loader
from clue_dist.train.saver import Saver
from clue_dist.train.setup import Setup
from clue_dist.train.step import learning_rate


class Meter:
    """Loss terms, speed, shares of the time that training waited for data and for saving.

    Every rank must add and read at the same step.
    """

    def __init__(self, setup: Setup, loader: Loader, saver: Saver, device: torch.device) -> None:
        self._setup, self._loader, self._saver, self._device = setup, loader, saver, device
        self._restart()

    def _restart(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = self._added = 0
        self._since, self._waited, self._held = time.perf_counter(), self._loader.waited, self._saver.waited

    def add(self, terms: dict[str, Tensor], skipped: bool) -> None:
        """The terms of a step; those of one that was skipped mean nothing."""
        self._steps += 1
        if skipped:
            return
        for name, value in terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._added += 1

    def read(self, step: int) -> dict[str, float]:
        """What happened up to `step`; begins anew."""
        means = self._means()
        seconds = time.perf_counter() - self._since
        means["epoch"] = self._setup.epoch(step)
        means["lr"] = learning_rate(self._setup, step - 1)
        means["cells_per_s"] = self._steps * int(self._setup.config.data.batch_size) / seconds
        means["data_wait"] = (self._loader.waited - self._waited) / seconds
        means["saving_wait"] = (self._saver.waited - self._held) / seconds
        if self._device.type == "cuda":
            means["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._restart()
        return means

    def _means(self) -> dict[str, float]:
        if not self._sums:
            return {}
        means = torch.stack(list(self._sums.values())) / self._added
        dist.all_reduce(means)
        return dict(zip(self._sums, (means / dist.get_world_size()).tolist(), strict=True))
