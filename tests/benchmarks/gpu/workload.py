"""Batches and models of a given shape, made up, so that a step needs no store."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from clue_dist.config import ModelConfig, ObjectiveConfig
from clue_dist.data.batch import (
    Batch,
    CodedCounts,
    Counts,
    ObservedModality,
    SparseCounts,
    find_pair_rows,
)
from clue_dist.losses.objective import Objective
from clue_dist.model.clue import CLUE
from clue_dist.model.modality_spec import AUTO_FEATURES, ModalitySpec
from clue_dist.model.noise import Noise
from clue_dist.store.rows import COUNT_BITS, CsrRows, code_rows

# The weights of `configs/atlas.json`.
ATLAS_TERMS = {
    "lambda_self": 0.02,
    "lambda_cross": 0.05,
    "lambda_mse": 0.01,
    "lambda_d": 0.05,
    "lambda_contrastive": 1.0,
}


PANEL = 200  # features of a further modality


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch and of what it holds; a modality of size 0 is left out."""

    name: str
    n_cells: int
    n_genes: int = 0
    n_peaks: int = 0
    n_proteins: int = 0
    n_panels: int = 0  # further modalities, of PANEL features each
    genes_per_cell: int = 1500  # non-zeros
    peaks_per_cell: int = 3500
    features_per_step: int = AUTO_FEATURES
    lanes: int = 8


SHAPES = [
    Shape("2,000 + 100", 512, n_genes=2_000, n_proteins=100, genes_per_cell=300),
    Shape("20,000 + 100,000 + 134", 512, 20_000, 100_000, 134),
    Shape("20,000 + 100,000 + 134, large batch", 4096, 20_000, 100_000, 134),
]


# For tests, where every launch is interpreted.
TINY = Shape("tiny", 32, 60, 90, 8, genes_per_cell=20, peaks_per_cell=30, features_per_step=40)
TINY_MODEL = ModelConfig(
    latent=8,
    trunk={"projection": 6, "hidden": 8, "members": 2},
    decoder={"hidden": 8},
    discriminator={"hidden": 8},
)


def make_batch(shape: Shape, seed: int = 0) -> Batch:
    """Draw a batch whose cells carry every modality."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(shape.n_cells)
    counts: dict[str, Counts] = {}
    if shape.n_genes:
        counts["rna"] = draw_sparse(shape, shape.n_genes, shape.genes_per_cell, 4.0, generator)
    if shape.n_peaks:
        counts["atac"] = draw_sparse(shape, shape.n_peaks, shape.peaks_per_cell, 0.0, generator)
    if shape.n_proteins:
        rates = torch.full((shape.n_cells, shape.n_proteins), 30.0)
        counts["adt"] = torch.poisson(rates, generator=generator)
    for number in range(shape.n_panels):
        rates = torch.full((shape.n_cells, PANEL), 3.0)
        counts[f"panel{number}"] = torch.poisson(rates, generator=generator)
    modalities = {name: ObservedModality(rows, values, rows) for name, values in counts.items()}
    observed = torch.ones(shape.n_cells, len(modalities), dtype=torch.bool)
    code = torch.zeros(shape.n_cells, dtype=torch.int64)
    return Batch(observed, code, modalities, find_pair_rows(observed))


def draw_sparse(
    shape: Shape, n_features: int, per_cell: int, mean: float, generator: torch.Generator
) -> SparseCounts:
    """Counts of 1 + a Poisson draw at about `per_cell` different features of each cell."""
    per_cell = min(per_cell, n_features)
    lengths = torch.randint(per_cell // 2, per_cell + 1, (shape.n_cells,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # An even spread with an offset of its own gives each cell sorted features that differ.
    offsets = torch.randint(n_features, (shape.n_cells,), generator=generator)
    parts = [
        ((torch.arange(int(n)) * n_features // int(n) + offset) % n_features).sort().values
        for n, offset in zip(lengths, offsets, strict=True)
    ]
    rates = torch.full((int(indptr[-1]),), mean)
    values = 1 + torch.poisson(rates, generator=generator)
    return SparseCounts(indptr.int(), torch.cat(parts).int(), values, n_features)


def code_batch(batch: Batch) -> Batch:
    """The batch as a loader gives it to a GPU: sparse counts are coded as a store would."""
    modalities = {
        name: replace(part, profiles=code_counts(part.counts))
        if isinstance(part.counts, SparseCounts)
        else part
        for name, part in batch.modalities.items()
    }
    return replace(batch, modalities=modalities)


def code_counts(counts: SparseCounts) -> CodedCounts:
    """Code counts, with bits for the count where one is above 1."""
    arrays = (counts.indptr.numpy(), counts.indices.numpy(), counts.values.numpy())
    bits = COUNT_BITS if (arrays[2] > 1).any() else 0
    rows = code_rows(CsrRows(*arrays, counts.n_features), bits)
    return CodedCounts(
        torch.from_numpy(rows.compute_starts().astype(np.int32)),
        torch.from_numpy(rows.codes),
        torch.from_numpy(rows.rest),
        torch.full((rows.n_rows,), bits, dtype=torch.uint8),
        counts.n_features,
        "made up",
    )


def make_objective(
    shape: Shape, config: ModelConfig | None = None, mixed_precision: bool = False
) -> Objective:
    """Make the model of a shape, of the sizes of `configs/atlas.json` by default, and its loss."""
    torch.manual_seed(0)
    specs = {}
    if shape.n_genes:
        specs["rna"] = _specify(shape, shape.n_genes, "log_cp10k", "nb")
    if shape.n_peaks:
        specs["atac"] = _specify(shape, shape.n_peaks, "tfidf", "bernoulli", thinning=0.5)
    if shape.n_proteins:
        specs["adt"] = _specify(shape, shape.n_proteins, "clr", "nb")
    for number in range(shape.n_panels):
        specs[f"panel{number}"] = _specify(shape, PANEL, "clr", "nb")
    model = CLUE(specs, 1, config or ModelConfig(latent=64, posterior="gpoe"))
    return Objective(model, ObjectiveConfig(**ATLAS_TERMS), [1.0] * len(specs), mixed_precision)


def _specify(
    shape: Shape, n_features: int, normalise: str, likelihood: str, thinning: float = 0.0
) -> ModalitySpec:
    subset = shape.features_per_step if shape.features_per_step < n_features else None
    return ModalitySpec(n_features, normalise, likelihood, subset, thinning)


def make_noise(shape: Shape, step: int, device: torch.device | str = "cpu") -> Noise:
    """Make the draws of a step for cells of one stratum."""
    return Noise(0, step, {"all": shape.n_cells}, shape.lanes, device=device)
