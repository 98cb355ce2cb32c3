"""Do a GPU and its kernels compute what a CPU and plain PyTorch compute?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clue_dist.config import ModelConfig
from clue_dist.data.batch import Counts, SparseCounts, compute_library_size
from clue_dist.model.decoders import select_features
from clue_dist.model.fused import FUSED_LIKELIHOODS
from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.model.noise import Noise
from clue_dist.model.trunk import Projection, normalise_counts
from tests.benchmarks.gpu.clock import time_calls
from tests.benchmarks.gpu.philox import draw_plainly
from tests.benchmarks.gpu.workload import (
    Shape,
    code_counts,
    draw_sparse,
    make_batch,
    make_objective,
)

COMPONENTS = 100  # of the projection that is compared


class HostNoise(Noise):
    """Draws on the host and copies to a device, so that devices can be compared."""

    def __init__(self, shape: Shape, step: int, device: torch.device) -> None:
        super().__init__(0, step, {"all": shape.n_cells}, shape.lanes)
        self.target = device

    def draw_mixing(self) -> tuple[Tensor, Tensor]:
        """As on the host."""
        partner, share = super().draw_mixing()
        return partner.to(self.target), share

    def draw_subset(self, size: int, total: int) -> Tensor:
        """As on the host."""
        return super().draw_subset(size, total).to(self.target)

    def _draw_rows(
        self,
        dtype: torch.dtype,
        tail: tuple[int, ...],
        fill: Callable[..., Tensor],
        rows: Tensor | None = None,
    ) -> Tensor:
        rows = None if rows is None else rows.cpu()
        return super()._draw_rows(dtype, tail, fill, rows).to(self.target)


def compare_steps(
    shape: Shape, device: torch.device, steps: int = 20, config: ModelConfig | None = None
) -> dict[str, Any]:
    """Train the same model by the same draws on the CPU and on a device, there in bf16, too.

    Returns:
        The largest difference of the loss to that of the CPU over all steps, relative to the
        largest loss.
    """
    wanted = _train_steps(shape, torch.device("cpu"), steps, config)
    measured = {
        "fp32": _train_steps(shape, device, steps, config),
        "bf16": _train_steps(shape, device, steps, config, torch.bfloat16),
    }
    differences = {
        f"{name} loss, relative difference": max(
            abs(a - b) for a, b in zip(losses, wanted, strict=True)
        )
        / max(map(abs, wanted))
        for name, losses in measured.items()
    }
    return {"steps": steps, **differences}


def _train_steps(
    shape: Shape,
    device: torch.device,
    steps: int,
    config: ModelConfig | None,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """The loss of every step, of weights in a type, whose optimizer keeps them in float32."""
    objective = make_objective(shape, config).to(device)
    weights = list(objective.parameters())
    masters = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, eps=1e-6)
    for weight in weights:
        weight.data = weight.data.to(dtype)
    batch, losses = make_batch(shape).to(device), []
    for step in range(steps):
        objective.zero_grad()
        loss, _ = objective.compute_loss(batch, HostNoise(shape, step, device))
        loss.backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        for weight, master in zip(weights, masters, strict=True):
            weight.data.copy_(master)
        losses.append(loss.item())
    return losses


def compare_kernels(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Compare every fused kernel with its twin: largest relative difference, and milliseconds."""
    from clue_dist.model.fused.projection import project_counts

    counts = _draw_counts(shape, device)
    results: dict[str, Any] = {}
    for method in ("log_cp10k", "tfidf", "log", "none"):
        layer = Projection(counts.n_features, COMPONENTS, 1.0).to(device)
        idf = torch.rand(counts.n_features, device=device) + 1 if method == "tfidf" else None

        def project_plainly(layer: Any = layer, idf: Any = idf, method: str = method) -> Tensor:
            result: Tensor = layer(normalise_counts(counts, method, idf))
            return result

        def project_fused(layer: Any = layer, idf: Any = idf, method: str = method) -> Tensor:
            return project_counts(counts, method, idf, layer.weight, layer.bias)[0]

        weights = [layer.weight]
        results[f"projection {method}"] = _compare(project_plainly, project_fused, weights)
    n_scored = min(shape.features_per_step, counts.n_features)
    features = torch.randperm(counts.n_features, device=device)[:n_scored].sort().values
    for name in FUSED_LIKELIHOODS:
        results[f"likelihood {name}"] = _compare_scores(name, counts, features)
    panel = torch.poisson(torch.full((shape.n_cells, shape.n_proteins), 30.0, device=device))
    proteins = torch.arange(shape.n_proteins, device=device)
    for name in ("nb", "normal"):
        results[f"likelihood {name}, dense"] = _compare_scores(name, panel, proteins)
    return results


def _compare_scores(name: str, counts: Counts, features: Tensor) -> dict[str, float]:
    """Compare the kernels of a likelihood with their twin, for two z of each cell."""
    from clue_dist.model.fused.likelihood import score_counts

    library = compute_library_size(counts).unsqueeze(1)
    size = 2, len(library), len(features)
    rate = (torch.randn(size, device=library.device) - 6).requires_grad_()
    theta = torch.randn(len(features), device=library.device).requires_grad_()
    gate = torch.randn_like(rate).requires_grad_() if LIKELIHOODS[name].has_gate else None
    parameters = LikelihoodParameters(rate, theta, library, gate)

    def score_plainly() -> Tensor:
        picked = select_features(counts, features)
        return LIKELIHOODS[name].score_profiles(picked, parameters)

    def score_fused() -> Tensor:
        return score_counts(name, counts, *parameters, features)

    inputs = [x for x in (rate, theta, gate) if x is not None]
    return _compare(score_plainly, score_fused, inputs)


def compare_expansion(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Compare batches that a device expands with those that the host decodes: bits have to agree.

    Returns:
        By sparse modality: entries that differ, bytes a non-zero takes on its way, and milliseconds
        and GB/s read and written of the expansion.
    """
    from clue_dist.data.expansion import expand_counts

    results: dict[str, Any] = {}
    for name, part in make_batch(shape).modalities.items():
        wanted = part.counts
        if not isinstance(wanted, SparseCounts):
            continue
        coded = code_counts(wanted)
        tensors = {name: getattr(coded, name) for name in ("starts", "codes", "rest", "bits")}
        moved = replace(coded, **{name: x.to(device) for name, x in tensors.items()})
        found = expand_counts(moved)
        seconds = time_calls(lambda moved=moved: expand_counts(moved), device)
        n_bytes = sum(tensor.nbytes for tensor in tensors.values())
        differing = [
            int((getattr(found, field).cpu() != getattr(wanted, field)).sum())
            for field in ("indptr", "indices", "values")
        ]
        results[name] = {
            "entries that differ": sum(differing),
            "bytes a non-zero": n_bytes / len(wanted.indices),
            "ms": 1e3 * seconds,
            "gb_per_s": (n_bytes + found.indices.nbytes + found.values.nbytes) / seconds / 1e9,
        }
    return results


def compare_draws(device: torch.device, n_cells: int = 512, width: int = 301) -> dict[str, Any]:
    """Compare the random words that a kernel draws with Philox in NumPy: all have to be equal."""
    from clue_dist.model.fused.counter_draws import draw_for_cells

    key, draw, cells = 0x123456789ABCDEF, 3, torch.arange(n_cells, dtype=torch.int32)
    drawn = draw_for_cells("integers", cells.to(device), width, key, draw).cpu().numpy()
    wanted = draw_plainly(cells.tolist(), width, key, draw)
    return {"words": wanted.size, "words that differ": int((drawn != wanted).sum())}


def _draw_counts(shape: Shape, device: torch.device) -> SparseCounts:
    generator = torch.Generator().manual_seed(1)
    counts = draw_sparse(shape, shape.n_genes, shape.genes_per_cell, 4.0, generator)
    return SparseCounts(
        counts.indptr.to(device),
        counts.indices.to(device),
        counts.values.to(device),
        counts.n_features,
    )


def _compare(
    plain: Callable[[], Tensor], fused: Callable[[], Tensor], weights: list[Tensor]
) -> dict[str, float]:
    """Differences of results and of gradients relative to the largest value, and times."""
    results = {}
    for name, work in (("plain", plain), ("fused", fused)):

        def run_both_ways(work: Callable[[], Tensor] = work) -> list[Tensor]:
            value = work()
            slopes = torch.autograd.grad(value.sum(), weights, allow_unused=True)
            return [value.detach()] + [
                torch.zeros_like(w) if g is None else g
                for w, g in zip(weights, slopes, strict=True)
            ]

        results[name] = run_both_ways(), 1e3 * time_calls(run_both_ways, weights[0].device)
    (wanted, plain_ms), (found, fused_ms) = results["plain"], results["fused"]
    differences = [
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(found, wanted, strict=True)
    ]
    return {
        "difference": differences[0],
        "of gradients": max(differences[1:]),
        "plain_ms": plain_ms,
        "fused_ms": fused_ms,
    }
