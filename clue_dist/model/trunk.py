"""The preprocessing of one modality that its K heads share (section 6 of the paper): x -> h."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import TrunkConfig
from clue_dist.data.batch import Counts, SparseCounts, compute_library_size
from clue_dist.model.entry_kernels import multiply_rows
from clue_dist.model.fused import can_fuse
from clue_dist.model.layers import Affine, Ensemble, ReadAffine
from clue_dist.model.noise import Noise

UNKNOWN_LIBRARY = 1000.0  # total counts of a cell where training did not look at sizes


def normalise_counts(counts: Counts, method: str, idf: Tensor | None = None) -> Counts:
    """Normalise raw counts, which are all that the store keeps.

    `clue_dist.normalise` does the same in NumPy.

    Args:
        counts: n profiles x.
        method: log_cp10k: ln(1 + 10^4 x / sum x). log: ln(1 + x). clr: that minus its mean over the
            cell's features, for modalities stored dense. tfidf: ln(1 + 10^4 t / sum t) with
            t = x * idf. none: x.
        idf: (features,), cells over cells with the feature, for tfidf.
    """
    if isinstance(counts, Tensor):
        return _normalise_dense(counts, method, idf)
    x = counts.values
    if method == "tfidf" and idf is not None:
        x = x * idf.index_select(0, counts.indices)
    if method in ("log_cp10k", "tfidf"):
        totals = counts.totals if x is counts.values else counts.sum_rows(x)
        scale = 1e4 / totals.clamp_min(1e-9)
        multiply = _multiply_rows_on_cpu if x.device.type == "cpu" else _multiply_rows
        x = multiply(counts, x, scale)
    if method in ("log_cp10k", "tfidf", "log"):
        x = torch.log1p(x)
    return counts.replace_values(x)


def _multiply_rows(counts: SparseCounts, values: Tensor, factor: Tensor) -> Tensor:
    """Multiply one value per non-zero, (nnz,), by the factor of its row, (n,)."""
    return values * factor.index_select(0, counts.entry_rows)


def _multiply_rows_on_cpu(counts: SparseCounts, values: Tensor, factor: Tensor) -> Tensor:
    """Do as `_multiply_rows`, in one pass over the non-zeros."""
    product = torch.empty_like(values)
    multiply_rows(*map(Tensor.numpy, (counts.indptr, values, factor, product)))
    return product


def _normalise_dense(x: Tensor, method: str, idf: Tensor | None) -> Tensor:
    if method in ("log", "clr"):
        x = torch.log1p(x)
        return x - x.mean(1, keepdim=True) if method == "clr" else x
    if method == "tfidf" and idf is not None:
        x = x * idf
    if method in ("log_cp10k", "tfidf"):
        return torch.log1p(1e4 * x / x.sum(1, keepdim=True).clamp_min(1e-9))
    return x


def compute_size_inputs(counts: Counts) -> Tensor:
    """ln of each cell's total count and of its number of detected features, (n, 2)."""
    detected = (counts > 0).sum(1) if isinstance(counts, Tensor) else counts.count_detected()
    return torch.stack([compute_library_size(counts), detected.clamp_min(1)], 1).log()


class Projection(nn.Module):
    """The first, sparse layer: features -> components.

    `model.initialise` folds means and scales of the features into it.

    Args:
        n_features: features of the modality.
        components: outputs.
        lr_scale: its learning rate, relative to `train.lr`; 0 keeps it as initialised.
    """

    weight: Tensor  # (features, components)
    bias: Tensor  # (components,)

    def __init__(self, n_features: int, components: int, lr_scale: float) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        start = {
            "weight": torch.randn(n_features, components) / n_features**0.5,
            "bias": torch.zeros(components),
        }
        for name, values in start.items():
            if lr_scale > 0:
                self.register_parameter(name, nn.Parameter(values))
            else:  # a buffer keeps its precision where parameters are bf16
                self.register_buffer(name, values)

    def forward(self, x: Counts) -> Tensor:
        """(n, features) -> (n, components); a sparse input stays sparse."""
        if isinstance(x, Tensor):
            return x.to(self.weight.dtype) @ self.weight + self.bias
        projected = F.embedding_bag(
            x.indices,
            self.weight,
            x.indptr,
            mode="sum",
            per_sample_weights=x.values.to(self.weight.dtype),
            include_last_offset=True,
        )
        return projected + self.bias


class Trunk(nn.Module):
    """Raw counts -> components x = [projection(normalised counts), size] -> ensemble(norm(x)).

    Args:
        n_features: features of the modality.
        normalisation: a method of `normalise_counts`.
        n_modalities: K, targets that need networks of their own where the trunk is not shared.
        config: widths and depths.
    """

    idf: Tensor  # (features,), for tfidf
    size: Tensor  # (2, 2), mean and standard deviation of `compute_size_inputs` over training cells
    batch_separation: Tensor  # (1,), how far components set batches apart, see `BatchShrinkage`

    def __init__(
        self, n_features: int, normalisation: str, n_modalities: int, config: TrunkConfig
    ) -> None:
        super().__init__()
        self.normalisation = normalisation
        self.register_buffer("batch_separation", torch.zeros(1))
        components = min(config.projection, n_features)
        self.register_buffer("idf", torch.ones(n_features))
        self.projection = Projection(n_features, components, config.projection_lr)
        # Normalisation takes most of a cell's size away, but a cell that is large or well captured
        # is so in every modality, which helps to match modalities.
        self.size_input = config.size_input and normalisation != "none"
        self.register_buffer("size", torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
        width = components + 2 * self.size_input
        self.norm = nn.LayerNorm(width)
        networks = config.members if config.shared else config.members * n_modalities
        self.ensemble = Ensemble(networks, width, config.hidden, config.depth, config.dropout)

    @property
    def width(self) -> int:
        """Of h."""
        return self.ensemble.width

    @property
    def typical_library(self) -> float:
        """Total counts of a typical training cell, the geometric mean.

        1,000 where training did not look at sizes, as with an earlier version.
        """
        log_mean = float(self.size[0, 0])
        return math.exp(log_mean) if log_mean > 0 else UNKNOWN_LIBRARY

    @property
    def typical_density(self) -> Tensor:
        """The share of the features that a typical training cell shows, ()."""
        return self.size[0, 1].exp() / len(self.idf)  # of the projection ZeRO-3 may hold a part

    def compute_components(self, counts: Counts) -> Tensor:
        """(n, features) -> (n, components), linear in the normalised profile but for the size."""
        x: Tensor
        sizes: Tensor | None = None
        if isinstance(counts, SparseCounts) and can_fuse(counts.values):
            from clue_dist.model.fused.projection import project_counts

            layer = self.projection
            idf = self.idf if self.normalisation == "tfidf" else None
            x, sizes = project_counts(counts, self.normalisation, idf, layer.weight, layer.bias)
        else:
            x = self.projection(normalise_counts(counts, self.normalisation, self.idf))
            if self.size_input:
                sizes = compute_size_inputs(counts)
        if self.size_input and sizes is not None:
            mean, deviation = self.size
            x = torch.cat([x, ((sizes - mean) / deviation).to(x.dtype)], 1)
        return x

    def forward(
        self, x: Tensor, noise: Noise | None, rows: Tensor | None
    ) -> tuple[Tensor, ReadAffine]:
        """Turn components into what the heads read.

        Args:
            x: (n, components).
            noise: for dropout, in training.
            rows: (n,), the cells' rows in the batch; None: all of them.

        Returns:
            h, (N, n, hidden), normalised, and what is still to be done to it; N is M, or M * K
            where the K targets share no trunk.
        """
        h: tuple[Tensor, ReadAffine] = self.ensemble(
            self._normalise(x), self.read_affine, noise, rows
        )
        return h

    def infer_linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Apply `forward` and the heads (N, hidden, outputs); see `Ensemble.infer_linear`."""
        return self.ensemble.infer_linear(self._normalise(x), self.read_affine, weight, bias)

    def read_affine(self) -> Affine:
        """Scale and shift of the norm of the components."""
        return Affine(self.norm.weight[None, None], self.norm.bias[None, None])

    def _normalise(self, x: Tensor) -> Tensor:
        """Normalise components (n, components), but for the scale and shift."""
        return F.layer_norm(x.to(self.norm.weight.dtype), x.shape[-1:], eps=self.norm.eps)
