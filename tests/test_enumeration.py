"""A binary HVAE of 2 + 2 bits on 2x2 images: distributions, objectives and ZGR against all its codes."""
import itertools
import math

import pytest
import torch
from torch import nn

from lib import hvae, stochastic, symmetric, train, zgr

BOTH = pytest.mark.parametrize("encoder", hvae.ENCODERS)
BITS = (2, 2)
CODES = torch.tensor(list(itertools.product((0.0, 1.0), repeat=sum(BITS))), dtype=torch.float64)     # [16, 4]


def tiny(encoder, gaussian=False, seed=1):
    """A float64 HVAE of 2 + 2 bits on 2x2 images whose encoder and decoder have something to say."""
    trunk = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh())
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)))
    model = hvae.HVAE(encoder, BITS, trunk, 5, decoder, gaussian, (1, 2, 2), hidden=20)
    hvae.initialise(model, train.generator(seed))
    with torch.no_grad():
        for parameter in [*model.encoder.parameters(), *model.decoder.parameters()]:
            parameter.mul_(3)
        if gaussian:
            model.log_sigma.fill_(-0.4)
    return model.double()


# ------------------------------------------------------------------------------------------------ brute force
def log_bernoulli(logits, z):
    """log of independent Bernoullis, from probabilities."""
    p = 1 / (1 + torch.exp(-logits))
    return torch.log(torch.where(z == 1, p, 1 - p)).flatten(1).sum(1)


def brute(model, x):
    """log p(x, z) and log q(z|x) of an image x [1, 2, 2] for all 16 codes, straight from the definitions: [16] each."""
    z0, z1, many = CODES[:, :2], CODES[:, 2:], x.expand(16, 1, 2, 2)
    prior, output = model.prior(z0), model.decoder(z1)
    if model.gaussian:
        sigma = model.log_sigma.exp()
        log_x = (-(many - output) ** 2 / (2 * sigma ** 2)).flatten(1).sum(1)
        log_x = log_x - 4 * torch.log(sigma * math.sqrt(2 * math.pi))
    else:
        log_x = log_bernoulli(output, many)
    log_p = -2 * math.log(2) + log_bernoulli(prior, z1) + log_x
    h = model.encoder.trunk(many)
    extra = model.encoder.to_z1(h)
    if model.kind == "ladder":
        log_q = log_bernoulli(model.encoder.to_z0(h) + model.encoder.skip(extra), z0) + log_bernoulli(prior + extra, z1)
    else:
        log_q = log_bernoulli(extra, z1) + log_bernoulli(model.encoder.to_z0(z1), z0)
    return log_p, log_q


def some_images(model, n=3):
    x = torch.rand(n, 1, 2, 2, dtype=torch.float64, generator=train.generator(7))
    return x if model.gaussian else x.round()


def given_bits(model, x, bit=None):
    """`drawn` of HVAE.draw_q for all 16 codes and one image: every draw replaced by the enumerated bits."""
    z0, z1 = CODES[:, :2], CODES[:, 2:]
    order = iter((z0, z1) if model.kind == "ladder" else (z1, z0))
    a = tuple(part.expand(16, -1) for part in model.encoder(x[None]))
    return model.draw_q(a, None, lambda logits, _: (bit or (lambda z, _: z))(next(order), logits))


@BOTH
@pytest.mark.parametrize("gaussian", [False, True])
def test_posteriors_and_both_objectives_are_the_enumerated_ones(encoder, gaussian):
    model = tiny(encoder, gaussian)
    for x in some_images(model):
        log_p, log_q = brute(model, x)
        torch.testing.assert_close(log_q.exp().sum().item(), 1.0)
        many, (z0, z1) = x.expand(16, 1, 2, 2), CODES.split(2, 1)
        of_p = sum(symmetric.p_loss(model, many, z0, z1)) + 2 * math.log(2)
        of_q = sum(symmetric.q_loss(model, model.encoder(many), z0, z1, model.prior(z0)))
        torch.testing.assert_close(-of_p, log_p, atol=1e-5, rtol=0)
        torch.testing.assert_close(-of_q, log_q, atol=1e-5, rtol=0)
        drawn = given_bits(model, x)
        elbo = (log_q.exp() * (log_p - log_q)).sum()
        own = -(log_q.exp() * sum(symmetric.elbo_loss(model, many, drawn))).sum()
        torch.testing.assert_close(own, elbo, atol=1e-5, rtol=0)
        assert elbo < log_p.logsumexp(0)


@BOTH
def test_p_is_a_distribution(encoder):
    """Over all images and codes the joint sums to one, and images are drawn with its marginal."""
    model = tiny(encoder)
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    marginal = torch.stack([brute(model, x)[0].logsumexp(0) for x in every]).exp()
    assert marginal.sum().item() == pytest.approx(1, abs=1e-12)
    noise, n = train.generator(3), 20_000
    drawn = model.draw_x(model.decode(model.draw_z(n, noise)[1]), noise)
    counts = torch.bincount((drawn.flatten(1) @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).long(), minlength=16)
    chi2 = ((counts - n * marginal) ** 2 / (n * marginal)).sum().item()
    assert chi2 < 50                                        # 15 degrees of freedom: exceeded once in 100,000 times


@BOTH
def test_draws_of_q_have_the_enumerated_frequencies(encoder):
    model, n = tiny(encoder), 20_000
    x = some_images(model)[0]
    expected = brute(model, x)[1].exp()
    drawn = model.draw_q(model.encoder(x.expand(n, 1, 2, 2)), train.generator(4))
    index = torch.cat(drawn[:2], 1) @ torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)
    chi2 = ((torch.bincount(index.long(), minlength=16) - n * expected) ** 2 / (n * expected)).sum().item()
    assert chi2 < 50


@BOTH
@pytest.mark.parametrize("gaussian", [False, True])
def test_evaluate_estimates_the_elbo(encoder, gaussian):
    model, batch = tiny(encoder, gaussian).float(), torch.tensor([[[[30, 200], [250, 90]]]], dtype=torch.uint8)
    x = symmetric.images(batch, gaussian)[0].double()
    log_p, log_q = brute(model.double(), x)
    elbo = (log_q.exp() * (log_p - log_q)).sum().item()
    terms = symmetric.evaluate(model.float(), batch.expand(20_000, 1, 2, 2), train.generator(5))
    assert abs(terms["elbo"].mean().item() - elbo) < 4 * terms["elbo"].std().item() / 20_000 ** 0.5
    torch.testing.assert_close(terms["elbo"], terms["rec"] - terms["kl"])


# ------------------------------------------------------------------------------------------------ ZGR
def test_zgr_is_its_definition():
    logits = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_()
    z = stochastic.zgr(logits, train.generator(1))
    assert set(z.tolist()) == {0.0, 1.0}
    assert torch.equal(z.detach(), stochastic.bernoulli(logits, train.generator(1)))
    weights = torch.arange(1.0, 13.0, dtype=torch.float64)
    (z * weights).sum().backward()
    p = 1 / (1 + torch.exp(-logits.detach()))
    torch.testing.assert_close(logits.grad, weights * torch.where(z == 1, (1 - p) / 2, p / 2))


def test_zgr_is_exact_for_quadratics_and_biased_beyond():
    logits = torch.tensor([0.8, -1.1, 0.3], dtype=torch.float64)
    codes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)
    square = torch.randn(3, 3, dtype=torch.float64, generator=train.generator(2))

    def gradients(f):
        leaf = logits.clone().requires_grad_()
        exact = torch.autograd.grad((log_bernoulli(leaf, codes).exp() * f(codes)).sum(), leaf)[0]
        q = log_bernoulli(logits, codes).exp()
        leaf = logits.clone().requires_grad_()
        own = torch.autograd.grad((q * f(stochastic.zgr_at(codes, leaf))).sum(), leaf)[0]
        return own, exact

    own, exact = gradients(lambda z: ((z @ square) * z).sum(1) + z @ square[0])
    torch.testing.assert_close(own, exact)
    own, exact = gradients(lambda z: torch.exp(2 * z.sum(1)))
    assert ((own - exact).abs() / exact.abs()).max() > 0.1


@BOTH
def test_zgrs_bias_is_measured_against_the_exact_gradient(encoder):
    """The report of the notebook, with the gradient of one parameter checked by finite differences."""
    model, batch = tiny(encoder), torch.tensor([[[[30, 200], [250, 90]]]], dtype=torch.uint8)
    exact, expected = zgr.elbo_gradients(model, batch)
    assert exact.shape == expected.shape == (sum(p.numel() for p in model.encoder.parameters()),)
    x = symmetric.images(batch, False)[0].double()

    def negative_elbo():
        with torch.no_grad():
            log_p, log_q = brute(model, x)
            return -(log_q.exp() * (log_p - log_q)).sum().item()

    parameter, start, at = model.encoder.trunk[1].weight, 0, None
    for own in model.encoder.parameters():
        if own is parameter:
            at = start
        start += own.numel()
    with torch.no_grad():
        parameter[0, 1] += 1e-5
        above = negative_elbo()
        parameter[0, 1] -= 2e-5
        below = negative_elbo()
        parameter[0, 1] += 1e-5
    assert exact[at + 1].item() == pytest.approx((above - below) / 2e-5, rel=1e-5)
    bias = ((expected - exact).norm() / exact.norm()).item()
    assert 1e-3 < bias < 0.5                                # biased, though not by much


@BOTH
def test_information_is_the_enumerated_one(encoder):
    """Of each bit of a tiny model: with x (or z0) given, from all codes; half the images are of one kind."""
    model = tiny(encoder)
    batch = torch.tensor([[[[30, 200], [250, 90]]], [[[230, 20], [25, 190]]]], dtype=torch.uint8)
    prior = torch.sigmoid(model.prior(CODES[::4, :2]))
    x = symmetric.images(batch, False)
    a = model.float().encoder(x)
    q_first = torch.sigmoid(a[0]).double()                          # ladder: q(z0|x); reverse: q(z1|x)
    p_given = prior.double().detach()

    def entropy(p):
        return -p * torch.log2(p) - (1 - p) * torch.log2(1 - p)
    found = symmetric.information(model, batch.repeat_interleave(4000, 0), train.generator(1))
    first = found["q_z0" if encoder == "ladder" else "q_z1"]
    torch.testing.assert_close(first, entropy(q_first.mean(0)) - entropy(q_first).mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["p_z1"], entropy(p_given.mean(0)) - entropy(p_given).mean(0), atol=2e-3, rtol=0.05)


def test_the_chain_reaches_the_limiting_distribution_of_its_transition_matrix():
    """Tiny model: the frequencies after many sweeps are those of the enumerated stationary distribution."""
    model = tiny("ladder")
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    with torch.no_grad():
        q = torch.stack([brute(model, x)[1].exp() for x in every])                            # [x, code]
        p = torch.stack([log_bernoulli(model.decoder(CODES[:, 2:]), x.expand(16, 1, 2, 2)) for x in every], 1).exp()
        stationary = torch.linalg.matrix_power(q @ p, 4096)[0]
    model, noise, n = model.float(), train.generator(6), 4000
    x = symmetric._start(model, n, noise)
    for _ in range(40):
        x = symmetric.sweep(model, x, noise)
    index = (x.flatten(1) @ torch.tensor([8.0, 4, 2, 1])).long()
    chi2 = ((torch.bincount(index, minlength=16) - n * stationary) ** 2 / (n * stationary)).sum().item()
    assert chi2 < 50
