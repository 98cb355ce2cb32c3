"""Every fused kernel against its twin in PyTorch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clue_dist.data.batch import SparseCounts, compute_library_size
from clue_dist.model import decoders, thinning, trunk
from clue_dist.model.decoders import select_features
from clue_dist.model.fused import FUSED_LIKELIHOODS, can_fuse
from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.model.trunk import Projection, compute_size_inputs, normalise_counts
from tests.benchmarks.gpu.counting import count_work
from tests.benchmarks.gpu.workload import (
    TINY,
    TINY_MODEL,
    make_batch,
    make_noise,
    make_objective,
)

pytest.importorskip("triton", reason="Triton, which comes with torch for CUDA, is not installed")

from clue_dist.model.fused.likelihood import score_counts
from clue_dist.model.fused.projection import project_counts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_FEATURES = 70


def make_counts() -> SparseCounts:
    """Five cells: one is empty, one has 63 non-zeros, and some counts are large, or were hidden."""
    generator = torch.Generator().manual_seed(0)
    lengths = [40, 0, 3, 63, 20]
    columns = [
        torch.randperm(N_FEATURES, generator=generator)[:n].sort().values.int() for n in lengths
    ]
    indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    values = torch.randint(1, 9, (sum(lengths),), generator=generator).float()
    values[::7] = 3000.0
    values[::11] = 0.0
    return SparseCounts(
        indptr.to(DEVICE), torch.cat(columns).to(DEVICE), values.to(DEVICE), N_FEATURES, True
    )


def make_dense_counts(likelihood: str) -> Tensor:
    """Five cells, some counts of which are 0; real values of either sign for `normal`."""
    generator = torch.Generator().manual_seed(0)
    if likelihood == "normal":
        return torch.randn(5, N_FEATURES, generator=generator).to(DEVICE)
    return torch.poisson(torch.full((5, N_FEATURES), 2.0), generator=generator).to(DEVICE)


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE)


@pytest.mark.parametrize("method", ["log_cp10k", "log", "tfidf", "none"])
def test_projected_counts_are_those_of_the_twin(method: str) -> None:
    counts, layer = make_counts(), Projection(N_FEATURES, 12, lr_scale=1.0).to(DEVICE)
    idf, upstream = draw(N_FEATURES).exp(), draw(5, 12)
    wanted = layer(normalise_counts(counts, method, idf))
    (wanted * upstream).sum().backward()
    gradients = [layer.weight.grad, layer.bias.grad]
    layer.zero_grad()
    idf = idf if method == "tfidf" else None
    projected, sizes = project_counts(counts, method, idf, layer.weight, layer.bias)
    (projected * upstream).sum().backward()
    torch.testing.assert_close(projected, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(sizes, compute_size_inputs(counts))
    for parameter, gradient in zip([layer.weight, layer.bias], gradients, strict=True):
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()
        )


@pytest.mark.parametrize("likelihood", FUSED_LIKELIHOODS)
@pytest.mark.parametrize(
    ("dense", "scored", "sources"),
    [(False, None, ()), (False, 40, ()), (False, 40, (2,)), (True, None, (2,)), (True, 40, ())],
)
def test_log_likelihood_and_gradients_are_those_of_the_twin(
    likelihood: str, dense: bool, scored: int | None, sources: tuple[int, ...]
) -> None:
    counts = make_dense_counts(likelihood) if dense else make_counts()
    features = None if scored is None else torch.randperm(N_FEATURES)[:scored].sort().values
    features = features if features is None else features.to(DEVICE)
    width = scored or N_FEATURES
    library = compute_library_size(counts).unsqueeze(1)
    rate = draw(*sources, 5, width).sub(4).requires_grad_()
    scale = 1.0 if likelihood == "normal" else 4.0
    theta, upstream = draw(width, scale=scale).requires_grad_(), draw(*sources, 5)
    gate = draw(*sources, 5, width, scale=9.0).requires_grad_() if likelihood == "zinb" else None
    picked = counts if features is None else select_features(counts, features)
    inputs = [x for x in (rate, theta, gate) if x is not None]
    parameters = LikelihoodParameters(rate, theta, library, gate)
    wanted = LIKELIHOODS[likelihood].score_profiles(picked, parameters)
    scores = score_counts(likelihood, counts, *parameters, features)
    size = 1 + wanted.detach().abs().max().item()
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-6 * size)
    slopes = [
        torch.autograd.grad((value * upstream).sum(), inputs, allow_unused=True)
        for value in (scores, wanted)
    ]
    for found, gradient in zip(*slopes, strict=True):
        if gradient is None:
            assert found is None
            continue
        torch.testing.assert_close(
            found, gradient, rtol=1e-4, atol=1e-5 * (1 + gradient.abs().max().item())
        )


def test_values_far_from_zero_are_scored_as_in_float64() -> None:
    """Of `normal`, 1,000 deviations from zero."""
    counts, rate = (50 + 0.05 * draw(*size, N_FEATURES) for size in ((5,), (2, 5)))
    theta = torch.full((N_FEATURES,), -3.0, device=DEVICE)
    inputs = rate.requires_grad_(), theta.requires_grad_()
    scores = score_counts("normal", counts, *inputs, torch.ones(5, 1, device=DEVICE))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scaled = (counts.double() - exact[0]) / exact[1].exp()
    wanted = (-0.5 * scaled**2 - exact[1]).sum(-1)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=0)
    slopes = [torch.autograd.grad(y.sum(), x) for y, x in ((scores, inputs), (wanted, exact))]
    for found, gradient in zip(*slopes, strict=True):
        size = gradient.abs().max().item()
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-5 * size)


def test_of_dense_profiles_nothing_is_kept_that_is_not_scored() -> None:
    features, sizes = torch.tensor([1, 5, 30], device=DEVICE), []
    rate = draw(5, 3).requires_grad_()

    def note_size(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        score_counts(
            "nb", make_dense_counts("nb"), rate, draw(3), draw(5, 1).exp(), features=features
        )
    assert max(sizes) == rate.numel()


def test_the_rising_factorial_of_the_kernel_is_exact_at_every_dispersion() -> None:
    """ln p differs from that of float64 by rounding alone."""
    pairs = list(itertools.product([-6.0, -1.0, 0.0, 2.0, 2.08, 4.0, 6.9], [1.0, 7.0, 500.0]))
    # A cell and a feature for each pair of dispersion and count.
    theta, x = torch.tensor(pairs, device=DEVICE).T.contiguous()
    n = len(pairs)
    place = torch.arange(n + 1, dtype=torch.int32, device=DEVICE)
    counts = SparseCounts(place, place[:-1].contiguous(), x, n)
    rate, library = torch.zeros(n, n, device=DEVICE), torch.full((n, 1), 100.0, device=DEVICE)
    found = score_counts("nb", counts, rate, theta, library).double()
    r, x, mean = theta.double().exp(), x.double(), 50.0
    zeros = r * (r / (r + mean)).log()
    gain = torch.lgamma(r + x) - torch.lgamma(r) + x * (mean / (r + mean)).log()
    torch.testing.assert_close(found, zeros.sum() + gain, rtol=2e-6, atol=2e-4)


def test_a_step_with_kernels_is_that_without_and_waits_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = replace(TINY, n_cells=8, lanes=4, genes_per_cell=12, peaks_per_cell=16)
    batch = make_batch(shape).to(DEVICE)
    losses, gradients = [], []
    monkeypatch.setattr(thinning, "_drop_entries", thinning._zero_entries)  # as a GPU does
    for fuses in (False, True):
        for module in (decoders, trunk):
            monkeypatch.setattr(module, "can_fuse", lambda _, fuses=fuses: fuses)
        objective = make_objective(shape, TINY_MODEL).to(DEVICE)
        noise = make_noise(shape, 1, DEVICE)
        with count_work(on_host=("triton/",)) as counts:
            loss, _ = objective.compute_loss(batch, noise)
            loss.backward()
        losses.append(loss.item())
        weights = [weight for weight in objective.parameters() if weight.grad is not None]
        gradients.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert not counts.syncs, counts.format_places()


@pytest.mark.slow
def test_kernels_compile_for_an_h100_on_any_machine() -> None:
    """In a process of its own: in this one they are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "tests.benchmarks.gpu.compile_kernels", "90"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(set(done.stdout.splitlines())) > 20


def test_kernels_are_left_to_gpus() -> None:
    assert not can_fuse(torch.ones(1))
