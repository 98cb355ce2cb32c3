"""What is logged of training: means over ranks and over the steps since the last reading."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.checkpoint.saver import Saver
from clue_dist.data.device_batches import DeviceBatches
from clue_dist.data.loader import Loader
from clue_dist.train.outcome import StepOutcome
from clue_dist.train.schedule import compute_learning_rate
from clue_dist.train.trainer import Trainer


class Meter:
    """Terms of the loss, speed, and the shares of time spent on waiting for data and for saving.

    Every rank must make the same calls at the same steps.

    Args:
        trainer: what training works with.
        loader: where its batches come from.
        saver: what saves it.
        sums: what `collect_sums` gave when the run was saved; empty in a fresh run.
    """

    def __init__(
        self,
        trainer: Trainer,
        loader: Loader | DeviceBatches,
        saver: Saver,
        sums: Mapping[str, float],
    ) -> None:
        self._trainer, self._loader, self._saver = trainer, loader, saver
        self._restart_sums(sums)

    def _restart_sums(self, sums: Mapping[str, float]) -> None:
        """Begin anew, with the sums over steps that are not logged yet."""
        self._sums = {
            # float64, so that sums over many steps keep the digits of each.
            name: torch.tensor(value, dtype=torch.float64, device=self._trainer.device)
            for name, value in sums.items()
        }
        self._steps_summed = int(self._sums.pop("steps", torch.tensor(0)))
        self._steps_timed = 0
        self._started = time.perf_counter()
        self._data_wait = self._loader.waited_seconds
        self._saving_wait = self._saver.waited_seconds

    def add_step(self, outcome: StepOutcome) -> None:
        """Add a step to the sums; the terms of a step that was skipped mean nothing."""
        self._steps_timed += 1  # its cells were read, whatever became of it
        if outcome.skipped:
            return
        for name, value in outcome.terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()
        self._steps_summed += 1

    def collect_sums(self) -> dict[str, float]:
        """Collect the sums since the last reading, and how many steps they are, to go on from.

        They are means over ranks, as another number of ranks may go on.
        """
        return self._average_over_ranks(1) | {"steps": self._steps_summed} if self._sums else {}

    def read_means(self, step: int) -> dict[str, float]:
        """Read what happened since the last reading, up to `step`, and begin anew."""
        setup = self._trainer.setup
        means = self._average_over_ranks(self._steps_summed)
        seconds = time.perf_counter() - self._started
        means["epoch"] = setup.count_epochs(step)
        means["lr"] = compute_learning_rate(setup, step - 1)  # rate of the step that ended
        means["cells_per_s"] = self._steps_timed * int(setup.config.data.batch_size) / seconds
        means["data_wait"] = (self._loader.waited_seconds - self._data_wait) / seconds
        means["saving_wait"] = (self._saver.waited_seconds - self._saving_wait) / seconds
        # Linux counts in KiB; what the loader holds in memory is in it.
        means["peak_host_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self._trainer.device.type == "cuda":
            means["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._restart_sums({})
        return means

    def _average_over_ranks(self, steps: int) -> dict[str, float]:
        """The sums divided by `steps`, averaged over ranks."""
        if not self._sums:
            return {}
        means: Tensor = torch.stack(list(self._sums.values())) / steps
        dist.all_reduce(means)  # one exchange for all terms
        return dict(zip(self._sums, (means / dist.get_world_size()).tolist(), strict=True))
