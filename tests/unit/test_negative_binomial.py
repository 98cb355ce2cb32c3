"""The negative binomial against torch's own operations, in float64 and at extremes."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from clue_dist.data.batch import Counts, SparseCounts
from clue_dist.model.negative_binomial import compute_log_rising_factorial, sum_log_probabilities


def draw_parameters(
    n_sources: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Rate (sources, 5, 7), r (7,) and library (5, 1)."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.randn(n_sources, 5, 7, generator=generator, dtype=dtype) - 2
    r = torch.randn(7, generator=generator, dtype=dtype).exp()
    library = 100 * torch.rand(5, 1, generator=generator, dtype=dtype) + 1
    return rate.requires_grad_(), r.requires_grad_(), library


def draw_counts(n_cells: int = 5) -> torch.Tensor:
    """Counts (n, 7), most of them 0, a few large."""
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(n_cells, 7, generator=generator, dtype=torch.float64)
    return (100 * (draws - 0.7).clamp_min(0)).round()


def make_sparse(x: torch.Tensor) -> SparseCounts:
    """The same counts as CSR."""
    rows, columns = x.nonzero(as_tuple=True)
    indptr = torch.zeros(len(x) + 1, dtype=torch.int32)
    indptr[1:] = (x > 0).sum(1).cumsum(0)
    return SparseCounts(indptr, columns.int(), x[rows, columns], x.shape[1])


def score_plainly(
    rate: torch.Tensor, r: torch.Tensor, library: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """What `sum_log_probabilities` gives, by torch's own operations."""
    log_ratio = library.log() + F.logsigmoid(rate) - r.log()
    rising = torch.lgamma(r + x) - torch.lgamma(r)
    return (x * F.logsigmoid(log_ratio) + r * F.logsigmoid(-log_ratio) + rising).sum(-1)


@pytest.mark.parametrize("n_sources", [1, 2])
@pytest.mark.parametrize("form", [torch.Tensor.clone, make_sparse])
def test_equals_plain_operations_with_its_gradient(
    n_sources: int, form: Callable[[torch.Tensor], Counts]
) -> None:
    (rate, r, library), x = draw_parameters(n_sources), draw_counts()
    want = score_plainly(rate, r, library, x)
    found = sum_log_probabilities(rate, r, library, form(x))
    torch.testing.assert_close(found, want)
    weight = torch.rand(want.shape, generator=torch.Generator().manual_seed(2), dtype=want.dtype)
    wanted, gradients = (
        torch.autograd.grad((weight * total).sum(), (rate, r)) for total in (want, found)
    )
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize("form", [torch.Tensor.clone, make_sparse])
def test_is_not_rounded_where_networks_multiply_in_bfloat16(
    form: Callable[[torch.Tensor], Counts],
) -> None:
    (rate, r, library), x = draw_parameters(dtype=torch.float32), form(draw_counts().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sum_log_probabilities(rate, r, library, x)
    assert torch.equal(mixed, sum_log_probabilities(rate, r, library, x))


def test_scores_without_a_count_are_those_of_zeros() -> None:
    rate, r, library = draw_parameters()
    nothing = torch.zeros(5, 7, dtype=rate.dtype)
    torch.testing.assert_close(
        sum_log_probabilities(rate, r, library, make_sparse(nothing)),
        score_plainly(rate, r, library, nothing),
    )


@pytest.mark.parametrize("form", [torch.Tensor.clone, make_sparse])
def test_scores_are_finite_at_extremes_as_are_their_gradients(
    form: Callable[[torch.Tensor], Counts],
) -> None:
    rate = torch.tensor([[-200.0, -90.0, 0.0, 90.0]]).requires_grad_()
    for theta, x in product((-200.0, -60.0, 0.0, 7.0), (0.0, 1.0, 1e5)):
        log_r = torch.full((4,), theta).requires_grad_()
        counts = form(torch.full((1, 4), x))
        total = sum_log_probabilities(rate, log_r.exp(), torch.tensor([[1e6]]), counts)
        of_rate, of_log_r = torch.autograd.grad(total.sum(), (rate, log_r))
        assert total.isfinite().all()
        assert of_rate.isfinite().all()
        assert of_log_r.isfinite().all()


def test_of_a_large_inverse_dispersion_the_scores_are_those_of_a_poisson() -> None:
    (rate, _, library), x = draw_parameters(1), draw_counts()
    total = sum_log_probabilities(rate, torch.full((7,), 1e9, dtype=rate.dtype), library, x)
    mean = library * F.sigmoid(rate)
    torch.testing.assert_close(total, (x * mean.log() - mean).sum(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("log_r", [-4.0, 0.0, 4.0, 7.0])
def test_gradients_in_float32_are_those_of_float64(log_r: float) -> None:
    (rate, _, library), x = draw_parameters(), draw_counts()
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        theta = torch.full((7,), log_r, dtype=dtype).requires_grad_()
        values = rate.detach().to(dtype).requires_grad_()
        total = sum_log_probabilities(values, theta.exp(), library.to(dtype), x.to(dtype))
        gradients[dtype] = torch.autograd.grad(total.sum(), (values, theta))
    for found, want in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=2e-4)


def test_rising_factorial_and_its_gradient_are_those_of_float64() -> None:
    r = torch.logspace(-2, 3, 200)[:, None].requires_grad_()
    x = torch.tensor([0.0, 1, 2, 5, 20, 300, 50_000]).expand(200, 7)
    exact = r.detach().double().requires_grad_()
    want = torch.lgamma(exact + x.double()) - torch.lgamma(exact)
    rising = compute_log_rising_factorial(r, x)
    torch.testing.assert_close(rising.double(), want, rtol=2e-6, atol=2e-5)
    rising.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(r.grad.double(), exact.grad, rtol=2e-5, atol=1e-6)


def test_rising_factorial_of_features_is_that_of_their_counts() -> None:
    r, x = torch.logspace(-2, 3, 7).requires_grad_(), draw_counts().float()
    feature = x.nonzero(as_tuple=True)[1].int()
    counts = x[x > 0]
    apart = compute_log_rising_factorial(r, counts, feature)
    together = compute_log_rising_factorial(r.expand(5, 7)[x > 0], counts)
    torch.testing.assert_close(apart, together)
    weight = torch.arange(1.0, 1 + len(counts))
    gradients = [torch.autograd.grad((weight * one).sum(), r)[0] for one in (apart, together)]
    torch.testing.assert_close(*gradients)
