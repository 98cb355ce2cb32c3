"""The shared preprocessing of one modality (section 6 of the paper): raw counts -> h, once for its K heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clue_dist.config import TrunkConfig
from clue_dist.data.batch import Counts, compute_library_size
from clue_dist.model.layers import Ensemble
from clue_dist.model.noise import Noise


def normalise_counts(counts: Counts, how: str, idf: Tensor | None = None) -> Counts:
    """Normalised values on the fly; the store keeps raw counts only. `clue_dist.normalise` is the same in NumPy.

    log_cp10k: ln(1 + 10^4 x / sum x). log: ln(1 + x). clr: that minus its mean over the cell's features (dense
    modalities). tfidf: ln(1 + 10^4 t / sum t) with t = x * idf, idf (features,) = cells / cells with the feature.
    none: as stored.
    """
    if isinstance(counts, Tensor):
        return _dense(counts, how, idf)
    x = counts.values
    if how == "tfidf" and idf is not None:
        x = x * idf[counts.indices]
    if how in ("log_cp10k", "tfidf"):
        scale = 1e4 / counts.sum_rows(x).clamp_min(1e-9)
        x = x * scale.repeat_interleave(counts.indptr.diff(), output_size=len(x))
    if how in ("log_cp10k", "tfidf", "log"):
        x = torch.log1p(x)
    return type(counts)(counts.indptr, counts.indices, x, counts.n_features)


def _dense(x: Tensor, how: str, idf: Tensor | None) -> Tensor:
    if how in ("log", "clr"):
        x = torch.log1p(x)
        return x - x.mean(1, keepdim=True) if how == "clr" else x
    if how == "tfidf" and idf is not None:
        x = x * idf
    if how in ("log_cp10k", "tfidf"):
        return torch.log1p(1e4 * x / x.sum(1, keepdim=True).clamp_min(1e-9))
    return x


class Projection(nn.Module):
    """The first, sparse layer: features -> components. `initialise` folds feature means and scales into it. lr_scale:
    its learning rate, relative to `train.lr`; 0 keeps it."""

    weight: Tensor
    bias: Tensor

    def __init__(self, n_features: int, components: int, lr_scale: float) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        for name, values in (
            (
                "weight",
                torch.randn(n_features, components) / n_features**0.5,
            ),  # (features, components)
            ("bias", torch.zeros(components)),
        ):
            if lr_scale > 0:
                self.register_parameter(name, nn.Parameter(values))
            else:  # a buffer keeps its precision where parameters are bf16
                self.register_buffer(name, values)

    def forward(self, x: Counts) -> Tensor:
        """(n, features) -> (n, components); a sparse input stays sparse."""
        if isinstance(x, Tensor):
            return x.to(self.weight.dtype) @ self.weight + self.bias
        weights = x.values.to(self.weight.dtype)
        out = F.embedding_bag(
            x.indices,
            self.weight,
            x.indptr,
            mode="sum",
            per_sample_weights=weights,
            include_last_offset=True,
        )
        return out + self.bias


class Trunk(nn.Module):
    """Raw counts -> components x = [projection(normalised counts), size] -> h = ensemble(layer norm(x))."""

    idf: Tensor
    size: Tensor

    def __init__(self, n_features: int, how: str, n_modalities: int, config: TrunkConfig) -> None:
        super().__init__()
        self.normalisation = how
        components = min(config.projection, n_features)
        self.register_buffer("idf", torch.ones(n_features))
        self.projection = Projection(n_features, components, config.projection_lr)
        # Normalisation takes most of a cell's size away; but what is large or well captured is so in every modality.
        self.size_input = config.size_input and how != "none"
        self.register_buffer(
            "size", torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        )  # mean, standard deviation of size_of
        width = components + 2 * self.size_input
        self.norm = nn.LayerNorm(width)
        networks = config.members if config.shared else config.members * n_modalities
        self.ensemble = Ensemble(networks, width, config.hidden, config.depth, config.dropout)

    @property
    def width(self) -> int:
        return self.ensemble.width

    def compute_components(self, counts: Counts) -> Tensor:
        """(n, features) -> (n, components), linear in the normalised profile but for the size."""
        x: Tensor = self.projection(normalise_counts(counts, self.normalisation, self.idf))
        if self.size_input:
            mean, scale = self.size
            x = torch.cat([x, ((compute_size_inputs(counts) - mean) / scale).to(x.dtype)], 1)
        return x

    def forward(self, x: Tensor, noise: Noise | None, rows: Tensor | None) -> Tensor:
        """Components (n, components) -> h (M, n, hidden); (M * K, n, hidden) where the K targets share no trunk."""
        out: Tensor = self.ensemble(self.norm(x.to(self.norm.weight.dtype)), noise, rows)
        return out


def compute_size_inputs(counts: Counts) -> Tensor:
    """ln of each cell's total count and of its number of detected features, (n, 2)."""
    detected = (counts > 0).sum(1) if isinstance(counts, Tensor) else counts.indptr.diff()
    return torch.stack([compute_library_size(counts), detected.clamp_min(1)], 1).log()
