"""Log-probabilities and divergences against torch.distributions, in float64; gradients of bits against enumeration."""
import itertools
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


# ------------------------------------------------------------------------------------------------ gradients of bits
LOGITS = torch.tensor([0.8, -1.7, 0.1, 2.6], dtype=torch.float64)
CODES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64)
VALUES = 5 + 2 * normal(16, seed=3)                                             # f of each code: no polynomial
ESTIMATES = {
    "disarm": lambda at, pair, _: stochastic.disarm(at, *pair[:2], *map(value, pair[:2])),
    "arm": lambda at, pair, _: stochastic.arm(pair[2], *map(value, pair[:2])),
    "reinforce-loo": lambda at, _, two: stochastic.reinforce_loo(at, *two, *map(value, two))}
WRONG = {
    "disarm, its sign flipped": lambda at, pair, _: stochastic.disarm(at, pair[1], pair[0], *map(value, pair[:2])),
    "disarm by sigmoid(logit)": lambda at, *drawn: ESTIMATES["disarm"](at, *drawn) * torch.exp(at.clamp(max=0)),
    "disarm of independent draws": lambda at, _, two: stochastic.disarm(at, *two, *map(value, two)),
    "arm, u mirrored": lambda at, pair, _: stochastic.arm(1 - pair[2], *map(value, pair[:2])),
    "loo of opposed draws": lambda at, pair, _: stochastic.reinforce_loo(at, *pair[:2], *map(value, pair[:2]))}


def value(z):
    return VALUES.to(z.dtype)[(z @ torch.tensor([8.0, 4, 2, 1], dtype=z.dtype)).long()]


def apart(estimate, dtype=torch.float64, n=200_000):
    """Standard errors, the largest over the bits, between the mean of n estimates and the enumerated gradient."""
    at, noise = LOGITS.to(dtype).expand(n, 4), generator(11)
    pair, two = stochastic.antithetic(at, noise), [stochastic.bernoulli(at, noise) for _ in range(2)]
    found = estimate(at, pair, two)
    assert found.shape == at.shape and found.dtype == dtype
    p = 1 / (1 + torch.exp(-at[0].double()))
    q = torch.where(CODES == 1, p, 1 - p).prod(1)
    exact = ((q * VALUES)[:, None] * (CODES - p)).sum(0)
    error = found.double().std(0) / n ** 0.5
    return ((found.double().mean(0) - exact) / error).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ESTIMATES)
def test_the_mean_of_an_estimator_is_the_enumerated_gradient(name, dtype):
    assert apart(ESTIMATES[name], dtype) < 3


@pytest.mark.parametrize("name", WRONG)
def test_an_estimator_with_a_fault_is_seen_to_be_biased(name):
    """The check above refuses what a slip makes of the estimators, the sign (-1)^z_anti flipped before all."""
    assert apart(WRONG[name]) > 20


def test_disarm_is_arm_averaged_over_the_uniform():
    logits = torch.linspace(-4, 4, 50, dtype=torch.float64).expand(500, 50)
    z, z_anti, u = stochastic.antithetic(logits, generator(2))
    p, f, f_anti = torch.sigmoid(logits), normal(500), normal(500, seed=1)
    low = torch.maximum((1 - p) * z, p * (1 - z_anti))                          # u > 1 - p where z, u < p where z_anti
    high = torch.minimum(1 - p * (1 - z), 1 - (1 - p) * z_anti)
    assert (low <= u).all() and (u <= high).all() and (z != z_anti).any()
    averaged = stochastic.arm((low + high) / 2, f, f_anti)
    torch.testing.assert_close(stochastic.disarm(logits, z, z_anti, f, f_anti), averaged, rtol=1e-12, atol=1e-12)


def test_opposed_draws_are_each_distributed_as_the_bits_and_agree_as_seldom_as_they_can():
    n = 200_000
    z, z_anti, _ = stochastic.antithetic(LOGITS.expand(n, 4), generator(4))
    p = torch.sigmoid(LOGITS)
    for draws, mean in ((z, p), (z_anti, p), (z == z_anti, (2 * p - 1).abs())):
        assert ((draws.double().mean(0) - mean).abs() < 4 * (mean * (1 - mean) / n).sqrt()).all()


def test_half_precision_logits_keep_their_probabilities():
    n = 400_000                                                 # a uniform in bfloat16 would give 1/256, not 1/404
    logits = torch.full((n, 1), -6.0, dtype=torch.bfloat16)
    z, z_anti, u = stochastic.antithetic(logits, generator(5))
    assert z.dtype == z_anti.dtype == torch.bfloat16 and u.dtype == torch.float32
    p = 1 / (1 + math.exp(6))
    for draws in (z, z_anti):
        assert abs(draws.double().mean().item() - p) < 4 * (p / n) ** 0.5
    f = torch.linspace(0, 1, n)
    assert stochastic.disarm(logits, z, z_anti, f, 1 - f).dtype == torch.bfloat16


def test_estimates_follow_from_the_generator_keep_every_leading_dimension_and_take_no_gradient():
    logits = normal(5, 7, 4).requires_grad_()
    z, z_anti, u = stochastic.antithetic(logits, generator(6))
    assert all(map(torch.equal, (z, z_anti, u), stochastic.antithetic(logits, generator(6))))
    weights = normal(4, seed=1).requires_grad_()
    f, f_anti = z @ weights, z_anti @ weights
    for found in (stochastic.disarm(logits, z, z_anti, f, f_anti), stochastic.arm(u, f, f_anti),
                  stochastic.reinforce_loo(logits, z, z_anti, f, f_anti)):
        assert found.shape == logits.shape and not found.requires_grad
