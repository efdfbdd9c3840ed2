"""Log-probabilities and divergences against torch.distributions, in float64."""
import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from lib import stochastic
from lib.train import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def test_gaussian_kl_is_the_kl_divergence():
    mean, log_var = 3 * normal(50, 7), 2 * normal(50, 7, seed=1)
    q = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(stochastic.gaussian_kl(mean, log_var), kl_divergence(q, p), rtol=1e-12, atol=1e-12)


def test_gaussian_kl_is_zero_at_the_prior_alone():
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert stochastic.gaussian_kl(zero, zero).tolist() == [0.0]
    assert stochastic.gaussian_kl(zero + 0.1, zero) > 0 and stochastic.gaussian_kl(zero, zero - 0.1) > 0


@pytest.mark.parametrize("shape", [(5, 1), (5, 4), (5, 3, 8, 8)])
@pytest.mark.parametrize("log_sigma", [0.0, -1.3, "tensor"])
def test_gaussian_log_prob_is_the_density_summed_over_an_item(shape, log_sigma):
    x, mean = normal(*shape), normal(*shape, seed=1)
    log_sigma = torch.tensor(0.7, dtype=torch.float64) if log_sigma == "tensor" else log_sigma
    expected = Normal(mean, math.exp(log_sigma)).log_prob(x).reshape(5, -1).sum(1)
    torch.testing.assert_close(stochastic.gaussian_log_prob(x, mean, log_sigma), expected, rtol=1e-12, atol=1e-12)


def test_gaussian_log_prob_passes_gradients_to_sigma():
    log_sigma = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x, mean = normal(4, 6), normal(4, 6, seed=1)
    stochastic.gaussian_log_prob(x, mean, log_sigma).sum().backward()
    torch.testing.assert_close(log_sigma.grad, (x - mean).square().sum() - 24, rtol=1e-12, atol=1e-12)


def test_reparameterised_draws_have_the_moments_asked_for():
    n = 200_000
    mean = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64).expand(n, 3)
    log_var = torch.tensor([0.0, 1.5, -3.0], dtype=torch.float64).expand(n, 3)
    z = stochastic.reparameterise(mean, log_var, generator(0))
    sigma = (0.5 * log_var[0]).exp()
    assert ((z.mean(0) - mean[0]).abs() < 4 * sigma / n ** 0.5).all()
    assert ((z.var(0) / log_var[0].exp() - 1).abs() < 4 * (2 / n) ** 0.5).all()
    assert (torch.corrcoef(z.T) - torch.eye(3)).abs().max() < 4 / n ** 0.5


def test_reparameterised_draws_follow_from_the_generator_and_pass_gradients():
    mean, log_var = normal(6, 2).requires_grad_(), normal(6, 2, seed=1).requires_grad_()
    z = stochastic.reparameterise(mean, log_var, generator(5))
    assert torch.equal(z, stochastic.reparameterise(mean, log_var, generator(5)))
    assert not torch.equal(z, stochastic.reparameterise(mean, log_var, generator(6)))
    z.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(log_var.grad, (0.5 * (z - mean)).detach())
