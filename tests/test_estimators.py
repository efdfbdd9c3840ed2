"""The study of the gradient estimators, on a dense stand-in whose every draw can be enumerated."""
import itertools

import pytest
import torch
from torch import nn

from lib import estimators, stochastic
from lib.train import generator

BITS, WORDS, DOCUMENTS = 3, 12, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


@pytest.fixture(scope="module")
def toy():
    """Documents, a linear encoder and a decoder whose NLL is far from quadratic in the bits."""
    x = torch.poisson(torch.full((DOCUMENTS, WORDS), 1.5, dtype=torch.float64), generator=generator(1))
    encoder = nn.Linear(WORDS, BITS).double()
    weights = normal(BITS, 4, seed=2), 2 * normal(4, WORDS, seed=3)
    with torch.no_grad():
        encoder.weight.copy_(0.3 * normal(BITS, WORDS, seed=4))
        encoder.bias.copy_(normal(BITS, seed=5))

    def nll(z):
        f = -(x * (torch.tanh(2 * z @ weights[0]) @ weights[1]).log_softmax(-1)).sum(-1)
        return f.sum(), f.detach()
    return x, encoder, nll


@pytest.fixture(scope="module")
def tables(toy):
    """f and slope of all codes, without the code under test."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)), dtype=torch.float64)

    def f(z):
        return toy[2](z.expand(DOCUMENTS, BITS)[None])[1][0]
    small = 1e-5 * torch.eye(BITS, dtype=torch.float64)
    slope = torch.stack([torch.stack([f(z + h) - f(z - h) for h in small], 1) for z in every], 1) / 2e-5
    return every, torch.stack([f(z) for z in every], 1), slope


def log_q(z, logits):
    return torch.distributions.Bernoulli(logits=logits).log_prob(z).sum(-1)


def negative_elbo(toy, tables, logits):
    every, f, _ = tables
    entropy = torch.distributions.Bernoulli(logits=logits).entropy().sum(-1)
    q = log_q(every, logits[:, None]).exp()
    return ((q * f).sum(1) - entropy).mean() + BITS * torch.log(torch.tensor(2.0))


def test_codes_and_their_nll_are_enumerated(toy, tables):
    f, slope = estimators.enumerate_nll(toy[2], DOCUMENTS, tables[0])
    assert torch.equal(estimators.codes(BITS, f), tables[0])
    torch.testing.assert_close(f, tables[1])
    torch.testing.assert_close(slope, tables[2], atol=1e-6, rtol=1e-6)


def test_the_exact_gradient_is_the_derivative_of_the_enumerated_expectation(toy, tables):
    every, f, _ = tables
    logits = toy[1](toy[0])
    expected = torch.autograd.grad((log_q(every, logits[:, None]).exp() * f).sum(), logits)[0]
    torch.testing.assert_close(estimators.exact(logits, f), expected)


def enumerated(name, logits, f, slope):
    """Mean [b] and trace of the covariance of one document's estimate, over all outcomes of its draws."""
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=BITS)), dtype=torch.float64)
    p, powers = logits.sigmoid(), torch.tensor([4, 2, 1])
    if name == "zgr":
        q, g = log_q(every, logits).exp(), slope * (every * (1 - p) + (1 - every) * p) / 2
        return (q[:, None] * g).sum(0), (q @ g.square() - (q @ g).square()).sum()
    mean, second = torch.zeros(BITS, dtype=torch.float64), 0.0
    for z, other in itertools.product(every, every):
        difference = f[(z.long() * powers).sum()] - f[(other.long() * powers).sum()]
        if name == "reinforce-loo":
            weight, g, more = (log_q(z, logits) + log_q(other, logits)).exp(), difference / 2 * (z - other), 0.0
        else:                       # u lies above 1 - p where z = 1, below p where the other is: in an interval
            low, high = torch.maximum((1 - p) * z, p * (1 - other)), torch.minimum(1 - p * (1 - z), 1 - (1 - p) * other)
            width = (high - low).clamp_min(0)
            weight, g = width.prod(), difference * ((low + high) / 2 - 0.5)
            more = difference.square() * (width.square() / 12).sum() if name == "arm" else 0.0
        mean, second = mean + weight * g, second + weight * (g.square().sum() + more)
    return mean, second - mean.square().sum()


@pytest.fixture(scope="module", params=["sampled", "analytic"])
def found(toy, request):
    x, encoder, nll = toy
    own = list(encoder.parameters())
    return request.param, estimators.measure(encoder(x), own, nll, generator(7), request.param, draws=10_000)


@pytest.mark.parametrize("name", stochastic.ESTIMATORS)
def test_bias_variance_and_cosine_are_the_enumerated_ones(toy, tables, found, name):
    (x, encoder, _), (every, f, slope), (kl, found) = toy, tables, found
    logits = encoder(x)
    whole = torch.autograd.grad(negative_elbo(toy, tables, logits), list(encoder.parameters()), retain_graph=True)
    whole = torch.cat([g.flatten() for g in whole])
    if kl == "sampled" and name != "zgr":
        f = f + log_q(every, logits.detach()[:, None])
    every = [enumerated(name, *parts) for parts in zip(logits.detach(), f, slope, strict=True)]
    error = torch.stack([mean for mean, _ in every]) - estimators.exact(logits, f)
    error = torch.cat([(error.T @ x).flatten(), error.sum(0)]) / DOCUMENTS
    traces = torch.stack([trace for _, trace in every]) * (x.square().sum(1) + 1) / DOCUMENTS ** 2
    expected = {"bias2": error.square().sum() / whole.square().sum(), "variance": traces.sum() / whole.square().sum(),
                "cosine": torch.cosine_similarity(whole + error, whole, dim=0)}
    for key, true in expected.items():
        assert abs(found[name][key]["value"] - true.item()) < 3 * found[name][key]["se"], key
    assert found[name]["variance"]["se"] < 0.05 * found[name]["variance"]["value"]
    if name == "zgr":
        assert found[name]["bias2"]["value"] > 10 * found[name]["bias2"]["se"] > 0
        assert found[name]["enumerated"]["value"] == pytest.approx(expected["bias2"].item(), rel=1e-5)
    else:
        assert expected["bias2"] < 1e-20 and found[name]["cosine"]["value"] > 0.99


def test_the_choice_of_documents_has_the_variance_of_their_gradients(toy, tables, found):
    x, encoder, _ = toy
    own = []
    for i in range(DOCUMENTS):
        alone = negative_elbo(toy, (tables[0], tables[1][i:i + 1], None), encoder(x[i:i + 1]))
        own.append(torch.cat([g.flatten() for g in torch.autograd.grad(alone, list(encoder.parameters()))]))
    own = torch.stack(own)
    expected = own.var(0).sum() / DOCUMENTS / own.mean(0).square().sum()
    assert found[1]["documents"]["variance"]["value"] == pytest.approx(expected.item())


def test_a_flipped_sign_is_seen_as_a_bias_of_twice_the_gradient(toy, tables, monkeypatch):
    x, encoder, nll = toy
    right = stochastic.disarm
    monkeypatch.setattr(stochastic, "disarm", lambda logits, z, other, *f: right(logits, other, z, *f))
    bias2 = estimators.measure(encoder(x), list(encoder.parameters()), nll, generator(7), "analytic")
    bias2, logits = bias2["disarm"]["bias2"], encoder(x)
    own, part = estimators.metric(logits, list(encoder.parameters())), estimators.exact(logits, tables[1]).flatten()
    whole = part + (logits * logits.sigmoid() * (-logits).sigmoid()).flatten()
    expected = 4 * (part @ own @ part / (whole @ own @ whole)).item()
    assert abs(bias2["value"] - expected) < 3 * bias2["se"] < 0.2 * expected


@pytest.mark.parametrize("bias", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("scales", [[1.0] * 30, [1.0] + [0.1] * 29])
def test_intervals_cover_the_truth(bias, scales):
    """Two standard errors about the squared bias, also where it is zero, and about the variance."""
    scales = torch.tensor(scales, dtype=torch.float64)
    whole, off, own = normal(30, seed=1), bias * normal(30, seed=2) / 30 ** 0.5, torch.eye(30, dtype=torch.float64)
    inside = {"bias2": 0, "variance": 0}
    true = {"bias2": (off.square().sum() / whole.square().sum()).item(),
            "variance": (scales.square().sum() / whole.square().sum()).item()}
    for i in range(300):
        told = estimators.describe(off + scales * normal(20, 10, 30, seed=100 + i), whole, own)
        for key in inside:
            inside[key] += abs(told[key]["value"] - true[key]) < 2 * told[key]["se"]
    assert min(inside.values()) > 0.9 * 300, inside


def test_what_cannot_be_measured_is_refused(toy):
    x, encoder, nll = toy
    own, logits = list(encoder.parameters()), encoder(x)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 9"):
        estimators.codes(9, x)
    with pytest.raises(ValueError, match="bits must be between 1 and 8, got 0"):
        estimators.measure(logits[:, :0], own, nll, generator(1))
    with pytest.raises(ValueError, match="at least 3 blocks"):
        estimators.measure(logits, own, nll, generator(1), draws=10)
    with pytest.raises(ValueError, match="2 documents"):
        estimators.measure(logits[:1], own, nll, generator(1))
    with pytest.raises(ValueError, match="unknown estimator 'rebar'"):
        estimators.draw("rebar", logits, x, x, generator(1))
    with pytest.raises(ValueError, match="gradient is zero"):
        estimators.measure(0 * logits, own, lambda z: (0 * z.sum(), 0 * z.sum(-1)), generator(1))
