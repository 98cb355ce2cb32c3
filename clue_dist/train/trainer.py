"""What training works with from its first step to its last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clue_dist.data.batch import Batch
from clue_dist.data.device_batches import DeviceBatches
from clue_dist.data.loader import Loader
from clue_dist.losses.objective import Objective, Result
from clue_dist.model.clue import CLUE
from clue_dist.model.counter_noise import choose_noise
from clue_dist.model.fused import has_triton
from clue_dist.model.noise import Noise
from clue_dist.model.posterior_encoder import Posterior
from clue_dist.ranks import Ranks
from clue_dist.train.schedule import compute_kl_weight
from clue_dist.train.setup import Setup


@dataclass(frozen=True)
class ValidationCells:
    """The cells that every validation looks at."""

    held_out: Batch | None  # which are scored; None if no cell is held out
    labels: np.ndarray  # of the held-out cells, "" where unknown
    fitting: Batch | None  # on which the common space is fitted; None if none has two modalities
    patterns: Batch | None  # training cells of every stratum; None if there is one alone


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with. It never changes; what a step changes is in the `RunState`."""

    engine: Any  # DeepSpeed's, around an `Objective`
    setup: Setup
    ranks: Ranks
    device: torch.device  # device of this rank

    @property
    def model(self) -> CLUE:
        """The model, whose parameters ZeRO-3 keeps apart outside of the engine's calls."""
        model: CLUE = self.engine.module.model
        return model

    def describe_device(self) -> str:
        """Name this rank's device, as "cpu" or the model of a GPU."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    def open_loader(self, step: int) -> Loader | DeviceBatches:
        """Open this rank's stream of micro-batches, from optimizer step `step` on.

        On a GPU they lie there already, expanded there from the store's bytes.
        """
        on_gpu = self.device.type == "cuda"
        loader = Loader(
            self.setup.store,
            self.setup.plan,
            rank=self.ranks.rank,
            world=self.ranks.world,
            first=step * self.setup.config.train.grad_accum,
            prefetch=self.setup.config.data.prefetch,
            form="coded" if on_gpu and has_triton() else "sparse",
        )
        return DeviceBatches(loader, self.device) if on_gpu else loader

    def load_validation_cells(self) -> ValidationCells:
        """Load the cells that every validation looks at onto the device."""
        batches = (
            self.setup.load_held_out_batch(),
            self.setup.load_fitting_batch(),
            self.setup.load_pattern_batch(),
        )
        held_out, fitting, patterns = (
            None if batch is None else batch.to(self.device) for batch in batches
        )
        return ValidationCells(held_out, self.setup.read_held_out_labels(), fitting, patterns)

    def compute_in_engine(self, compute: Callable[[Objective], Result]) -> Result:
        """Compute something of the objective, whose parameters ZeRO-3 gathers meanwhile.

        Every rank must call.
        """
        result: Result = self.engine(compute)
        return result

    @torch.no_grad()
    def encode_batch(self, batch: Batch) -> Posterior:
        """Encode cells by the present weights, without dropout. Every rank must call."""
        self.engine.eval()
        posterior = self.compute_in_engine(lambda objective: objective.model.encode_batch(batch))
        self.engine.train()
        return posterior

    def embed_batch(self, batch: Batch) -> Tensor:
        """Embed cells by everything observed, (B, K * d). Every rank must call."""
        return self.model.read_latents(batch, self.encode_batch(batch))[0]

    def compute_loss(
        self, batch: Batch, step: int, micro_step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch, and its terms without their weights, () each.

        Args:
            batch: the micro-batch, on the device.
            step: the optimizer step, counted from 0.
            micro_step: which micro-batch of the step it is.
        """
        noise, beta = self._draw_noise(batch, step, micro_step), compute_kl_weight(self.setup, step)
        return self.compute_in_engine(lambda objective: objective.compute_loss(batch, noise, beta))

    def split_loss(self, batch: Batch, step: int, micro_step: int) -> dict[str, Tensor]:
        """Split what `compute_loss` computes into its terms and what each modality adds to them."""
        noise, beta = self._draw_noise(batch, step, micro_step), compute_kl_weight(self.setup, step)
        return self.compute_in_engine(lambda objective: objective.split_loss(batch, noise, beta))

    def _draw_noise(self, batch: Batch, step: int, micro_step: int) -> Noise:
        """By micro-batch and lane, so that a cell gets the same noise on any number of ranks."""
        plan = self.setup.plan
        micro_batch = step * self.setup.config.train.grad_accum + micro_step
        return choose_noise(batch.observed)(
            self.setup.config.seed,
            micro_batch,
            plan.compose_batch(micro_batch),
            plan.lanes,
            self.ranks.rank,
            self.ranks.world,
            self.device,
        )
