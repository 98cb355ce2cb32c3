"""Terms of the negative binomial against torch's own operations, in float64 and at extremes."""

import torch
from torch.nn import functional as F

from clue_dist.model.likelihoods import LIKELIHOODS, LikelihoodParameters
from clue_dist.model.negative_binomial import compute_log_rising_factorial, sum_log_zeros


def draw_parameters(
    n_sources: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """Rate (sources, 5, 7), r (7,) and library (5, 1)."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.randn(n_sources, 5, 7, generator=generator, dtype=dtype) - 2
    r = torch.randn(7, generator=generator, dtype=dtype).exp()
    library = 100 * torch.rand(5, 1, generator=generator, dtype=dtype) + 1
    return rate.requires_grad_(), r.requires_grad_(), library


def test_zeros_have_the_gradient_of_their_differences() -> None:
    assert torch.autograd.gradcheck(sum_log_zeros, draw_parameters())


def test_zeros_sum_to_what_each_of_them_has() -> None:
    rate, r, library = draw_parameters(dtype=torch.float32)
    parameters = LikelihoodParameters(rate, r.log(), library, gate=torch.zeros_like(rate))
    for name, likelihood in LIKELIHOODS.items():
        want = likelihood.compute_log_zero(parameters).sum(-1)
        torch.testing.assert_close(likelihood.sum_log_zeros(parameters), want, msg=name)


def test_zeros_are_finite_at_extremes_as_are_their_gradients() -> None:
    rate = torch.tensor([[-200.0, -90.0, 0.0, 90.0]]).requires_grad_()
    for theta in (-200.0, -60.0, 0.0, 7.0):
        r = torch.full((4,), theta).exp().requires_grad_()
        total = sum_log_zeros(rate, r, torch.tensor([[1e6]]))
        of_rate, of_r = torch.autograd.grad(total.sum(), (rate, r))
        assert total.isfinite().all()
        assert of_rate.isfinite().all()
        assert of_r.isfinite().all()


def test_zeros_of_a_large_inverse_dispersion_are_those_of_a_poisson() -> None:
    rate, _, library = draw_parameters(1)
    total = sum_log_zeros(rate, torch.full((7,), 1e9, dtype=rate.dtype), library)
    torch.testing.assert_close(total, -(library * F.sigmoid(rate)).sum(-1), rtol=1e-6, atol=0)


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
