"""A model without training: a fixed random projection per modality, loaded as a real one is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clue_dist.data.batch import Batch, SparseCounts
from clue_dist.store.batch_vocabulary import NO_BATCHES, BatchVocabulary
from clue_dist.store.manifest_parts import Modality
from clue_dist.store.reader import Store


class Projection:
    """z from a modality is log1p(counts) @ a fixed matrix; joint z is the mean over modalities."""

    def __init__(self, modalities: dict[str, Modality], latent: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.width = latent * len(modalities)
        self.order = list(modalities)
        self.weights = {
            m: torch.randn(v.n_features, self.width, generator=draw) for m, v in modalities.items()
        }

    def to(self, device: Any) -> Projection:
        return self

    def embed_batch(
        self, batch: Batch, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.observed.shape[1] == len(self.order)
        total = torch.zeros(batch.n_cells, self.width)
        alone = {}
        for k, m in enumerate(self.order):
            if m not in batch.modalities:
                continue
            assert batch.observed[:, k].sum() == len(batch.modalities[m].rows)
            # Real values may be negative.
            counts = dense(batch.modalities[m].counts).clamp(min=0)
            alone[m] = counts.log1p() @ self.weights[m]
            total.index_add_(0, batch.modalities[m].rows, alone[m])
        return total / batch.observed.sum(1, keepdim=True), alone

    def reweigh_as_joint(self, alone: Tensor) -> Tensor:
        return alone

    def embed_batch_with_variance(
        self, batch: Batch, per_modality: bool = True
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """The variance is the share of modalities that were not observed."""
        joint, alone = self.embed_batch(batch)
        unseen = 1 - batch.observed.float().mean(1, keepdim=True)
        return joint, alone, unseen.expand_as(joint)


def widen_modalities(store: Store) -> dict[str, Modality]:
    """One modality more than a store of RNA and proteins has, and these in another order."""
    stored = store.manifest.modalities
    peaks = Modality(kind="atac", storage="sparse", features=["peak-0", "peak-1"])
    return {"adt": stored["adt"], "atac": peaks, "rna": stored["rna"]}


def dense(counts: SparseCounts | Tensor) -> Tensor:
    """Counts as (n, features) float32."""
    if isinstance(counts, Tensor):
        return counts
    out = torch.zeros(len(counts.indptr) - 1, counts.n_features)
    out[counts.entry_rows, counts.indices.long()] = counts.values
    return out


@dataclass(frozen=True)
class FakeTrainedModel:
    """What `load_model` gives, with a `Projection` as its model."""

    modalities: dict[str, Modality]
    latent: int = 3
    private: int = 0
    private_scale: float = 0.2
    has_common_space: bool = True
    name: str = "step-7"
    seen_cells: frozenset[str] = frozenset()
    batch_vocabulary: BatchVocabulary = NO_BATCHES
    model: Any = field(default=None)

    def __post_init__(self) -> None:
        if self.model is None:
            object.__setattr__(self, "model", Projection(self.modalities, self.latent))
