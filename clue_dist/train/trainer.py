"""What training works with from its first step to its last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.data.loader import Loader
from clue_dist.model.noise import Noise
from clue_dist.ranks import Ranks
from clue_dist.train.schedule import compute_kl_weight
from clue_dist.train.setup import Setup


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with. It never changes; what a step changes is in the `RunState`."""

    engine: Any  # DeepSpeed's, around an `Objective`
    setup: Setup
    ranks: Ranks
    device: torch.device  # device of this rank

    def open_loader(self, step: int) -> Loader:
        """Open this rank's stream of micro-batches, from optimizer step `step` on."""
        return Loader(
            self.setup.store,
            self.setup.plan,
            rank=self.ranks.rank,
            world=self.ranks.world,
            first=step * self.setup.config.train.grad_accum,
            prefetch=self.setup.config.data.prefetch,
            pin=self.device.type == "cuda",
        )

    def load_held_out_batch(self) -> Batch | None:
        """Load the validation cells onto the device; None if no cell is held out."""
        batch = self.setup.load_held_out_batch()
        return batch.to(self.device) if batch is not None else None

    def load_fitting_batch(self) -> Batch | None:
        """Load the cells on which the common space is fitted; None if none has two modalities."""
        batch = self.setup.load_fitting_batch()
        return batch.to(self.device) if batch is not None else None

    def compute_loss(
        self, batch: Batch, step: int, micro_step: int, by_modality: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch, and its terms without their weights, () each.

        Args:
            batch: the micro-batch, on the device.
            step: the optimizer step, counted from 0.
            micro_step: which micro-batch of the step it is.
            by_modality: whether the terms also say what each modality adds to them.
        """
        # Drawn by micro-batch and lane, so that a cell gets the same noise on any number of ranks.
        plan = self.setup.plan
        micro_batch = step * self.setup.config.train.grad_accum + micro_step
        noise = Noise(
            self.setup.config.seed,
            micro_batch,
            plan.compose_batch(micro_batch),
            plan.lanes,
            self.ranks.rank,
            self.ranks.world,
            self.device,
        )
        loss, terms = self.engine(batch, noise, compute_kl_weight(self.setup, step), by_modality)
        return loss, terms
