"""What came of a step, which a GPU tells a step late: to ask it at once would make it idle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clue_dist.data.batch import Batch


@dataclass(frozen=True)
class StepOutcome:
    """What came of an optimizer step."""

    step: int  # its number, counted from 0
    # What belongs to this rank alone:
    batches: list[Batch]  # micro-batches
    terms: dict[str, Tensor]  # loss and its terms, () each
    # What is the same on all ranks:
    loss: float  # mean over ranks
    skipped: bool  # loss or gradient were not finite, and no weight has changed
    stop_requested: bool  # a signal came to one rank at least
    save_failed: bool  # one rank at least could not write what it had to save

    @property
    def ends_training(self) -> bool:
        """Whether no further step follows, once this is known."""
        return self.stop_requested or self.save_failed


class LateOutcome:
    """The outcome of a step whose numbers are on their way to the host.

    Args:
        step: number of the step, counted from 0.
        batches: its micro-batches.
        terms: loss and its terms, () each.
        sums: over ranks: loss, ranks where something is not finite, asked to stop, failed to save.
    """

    def __init__(
        self, step: int, batches: list[Batch], terms: dict[str, Tensor], sums: Tensor
    ) -> None:
        self.step, self.batches, self.terms = step, batches, terms
        self._arrival: torch.cuda.Event | None = None
        on_gpu = sums.is_cuda
        self._sums = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=on_gpu)
        self._sums.copy_(sums, non_blocking=True)
        if on_gpu:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read_outcome(self) -> StepOutcome:
        """Wait for the numbers; the device goes on with what it was given after this step."""
        if self._arrival is not None:
            self._arrival.synchronize()
        loss_sum, n_bad, n_stops, n_failures = self._sums.tolist()
        mean = loss_sum / dist.get_world_size()
        return StepOutcome(
            self.step, self.batches, self.terms, mean, n_bad > 0, n_stops > 0, n_failures > 0
        )


class OutcomeReader:
    """Gives the outcomes of steps in their order: each at once, or one step late on a GPU."""

    def __init__(self) -> None:
        self._waiting: LateOutcome | None = None  # of the step before

    def read_outcomes(
        self, latest: StepOutcome | LateOutcome, wait_for_latest: bool
    ) -> list[StepOutcome]:
        """Read the outcomes that are known and have not been read.

        Args:
            latest: that of the step just taken.
            wait_for_latest: whether it has to be among them. It is, too, where an earlier outcome
                ends the training.
        """
        outcomes = [] if self._waiting is None else [self._waiting.read_outcome()]
        self._waiting = None
        if isinstance(latest, StepOutcome):
            outcomes.append(latest)
        elif wait_for_latest or any(outcome.ends_training for outcome in outcomes):
            outcomes.append(latest.read_outcome())
        else:
            self._waiting = latest
        return outcomes
