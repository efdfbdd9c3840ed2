"""Objective, training and evaluation of the VampPrior against float64 code, quadrature and a hand-made Adam."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_vamp import make, within
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, MixtureSameFamily, Normal

from lib import binarised, data, vampnets, vampprior
from lib.stochastic import gaussian_kl
from lib.train import generator

X = torch.linspace(0, 1, 3 * 784).view(3, 1, 28, 28)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", size=28).train


# ------------------------------------------------------------------------------------------------ objective
class Fixed(nn.Module):
    """q(z2|x) or p(z1|z2) whose mean and log variance are the same everywhere."""

    def __init__(self, mean, log_var):
        super().__init__()
        self.mean, self.log_var = mean, log_var

    def forward(self, x):
        return self.mean.expand(len(x), -1), self.log_var.expand(len(x), -1)


class Reporter(nn.Module):
    """A decoder that notes the codes that it gets; logits 0 of a single pixel."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, *codes):
        self.seen.append(codes)
        return torch.zeros(len(codes[0]), 1)


def test_the_sampled_kl_is_unbiased_and_another_sign_or_a_lost_term_would_be_seen():
    mean, log_var = torch.tensor([[1.5, -0.3]]), torch.tensor([[-1.0, 0.7]])
    model = vampprior.VAE(vampprior.Standard(2), Fixed(mean, log_var), Reporter())
    _, kl = model.terms(torch.zeros(1, 1), generator(1), model.components(), 200_000)
    expected = gaussian_kl(mean, log_var).item()
    assert kl.shape == (1, 200_000) and within(kl[0], expected, 3)
    assert not within(-kl[0], expected) and not within(kl[0] + 0.5 * log_var.sum(), expected)


def dense(layers, h):
    """Flatten, gated and plain dense layers in float64, from their weights."""
    h = h.flatten(1)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            h = F.linear(h, layer.weight.double(), layer.bias.double())
            if isinstance(layer, vampnets.GatedLinear):
                half = h.shape[1] // 2
                h = h[:, :half] * torch.sigmoid(h[:, half:])
    return h


def gaussian(heads, h):
    mean, log_var = dense([heads.mean], h), dense([heads.log_var], h).clamp(-6, 2)
    return Independent(Normal(mean, (0.5 * log_var).exp()), 1)


def direct(model):
    """The distributions of a gated HVAE with a VampPrior, in float64: q(z2|x), q(z1|x, z2), p(z2), p(z1|z2), p(x|z)."""
    lower, decoder = model.lower, model.decoder

    def q2(x):
        return gaussian(model.encoder.heads, dense(model.encoder.trunk, x))

    def q1(x, z2):
        joint = torch.cat([dense(lower.features, x), dense([lower.from_z2], z2)], 1)
        return gaussian(lower.heads, dense([lower.joint], joint))

    at_u = q2(model.prior.u.double().clamp(0, 1))
    p2 = MixtureSameFamily(Categorical(torch.ones(len(model.prior.u)).double()), at_u)

    def p1(z2):
        return gaussian(lower.prior_heads, dense(lower.prior_trunk, z2))

    def px(z2, z1):
        h = torch.cat([dense([own], z) for own, z in zip(decoder.own, (z2, z1), strict=True)], 1)
        return Independent(Bernoulli(logits=dense(decoder.joint, h)), 1)
    return q2, q1, p2, p1, px


@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_the_terms_of_the_hvae_are_the_logarithms_of_its_distributions_at_the_same_noise(k):
    model = make(k=4, d=2)
    x, noise = torch.bernoulli(X, generator=generator(3)), generator(5)
    q2, q1, p2, p1, px = direct(model)
    many = x.double().repeat_interleave(k, 0)
    eps2, eps1 = (torch.randn(3 * k, 2, generator=noise).double() for _ in range(2))
    upper = q2(many)
    z2 = upper.mean + eps2 * upper.stddev
    below = q1(many, z2)
    z1 = below.mean + eps1 * below.stddev
    expected = (px(z2, z1).log_prob(many.flatten(1)), upper.log_prob(z2) - p2.log_prob(z2),
                below.log_prob(z1) - p1(z2).log_prob(z1))
    found = model.terms(x, generator(5), model.components(), k)
    assert len(found) == 3
    for own, right in zip(found, expected, strict=True):
        assert own.shape == (3, k)
        torch.testing.assert_close(own.double(), right.view(3, k), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_log_weights_average_to_the_evidence_and_the_elbo_found_by_quadrature(images):
    """One dimension a layer: p(x), and E_q of the terms, are sums over a grid."""
    model = make(k=3, d=1, seed=3, images=images, start="images")
    for heads in (layer for layer in model.modules() if isinstance(layer, vampnets.Gaussian)):
        heads.log_var.weight.data *= 0.1                                 # no peak falls between two points of the grid
    model.decoder.joint[-1].weight.data *= 0.03                           # nor are the weights of a few draws all
    x = torch.bernoulli(X[1:2], generator=generator(3))
    q2, q1, p2, p1, px = direct(model)
    axis = torch.linspace(-8, 8, 200).double()[:, None]
    z2, z1 = axis.repeat_interleave(200, 0), axis.repeat(200, 1)
    cell = math.log((axis[1] - axis[0]).item() ** 2)
    many = x.double().flatten(1).expand(4000, -1)
    rec = torch.cat([px(a, b).log_prob(many) for a, b in zip(z2.split(4000), z1.split(4000), strict=True)])
    log_q = q2(x.double()).log_prob(z2) + q1(x.double().expand(len(z2), -1, -1, -1), z2).log_prob(z1)
    log_joint = rec + p2.log_prob(z2) + p1(z2).log_prob(z1)
    assert (log_q + cell).logsumexp(0).exp().item() == pytest.approx(1, abs=1e-5)
    evidence = (log_joint + cell).logsumexp(0)
    elbo = ((log_q + cell).exp() * (log_joint - log_q)).sum()
    rec, *kls = model.terms(x, generator(6), model.components(), 20_000)
    weights = (rec - sum(kls))[0].double()
    assert evidence - elbo > 0.3 and within(weights, elbo) and within((weights - evidence).exp(), 1.0)
    assert not any(within(weights + 2 * kl[0], elbo) or within((weights + 2 * kl[0] - evidence).exp(), 1) for kl in kls)


# ------------------------------------------------------------------------------------------------ training
def test_the_kls_weight_rises_by_epochs_and_is_1_after_the_warm_up(images):
    model = make()
    step, _ = vampprior.training(model, generator(1), 1e-3, binarised.draw, warmup=4, per_epoch=3)
    for t in range(15):
        found = step(images[:20])
        assert found.keys() == {"loss", "rec", "kl", "kl_z2", "kl_z1"}
        beta = min(1, (t // 3 + 1) / 4)
        assert ((found["loss"] - found["rec"]) / found["kl"]).item() == pytest.approx(beta, abs=1e-3), t
        assert found["kl"].item() == pytest.approx((found["kl_z2"] + found["kl_z1"]).item(), rel=1e-6)
    assert model.done == 15
    found = vampprior.training(make(model="vae"), generator(1), 1e-3)[0](images[:20])
    assert found.keys() == {"loss", "rec", "kl"} and found["loss"] == found["rec"] + found["kl"]


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("model", "kind"), [("hvae", "vamp"), ("vae", "mog")])
def test_a_step_is_adam_on_the_weighted_elbo_of_grey_images_and_on_gradients_of_norm_1(model, kind, normalised, images):
    own, lr = make("port", model, kind, images=images, start="inverse"), 1e-3
    twin, noise = copy.deepcopy(own), generator(7)
    optimizer = torch.optim.Adam(twin.parameters(), lr=lr)
    step, state = vampprior.training(own, generator(7), lr, warmup=3, per_epoch=1, normalised=normalised)
    for t in range(4):
        batch = images[16 * t:16 * t + 16]
        found = step(batch)
        rec, *kls = (term.mean() for term in twin.terms(batch.float() / 255, noise, twin.components()))
        loss = min(1, (t + 1) / 3) * sum(kls) - rec
        optimizer.zero_grad()
        loss.backward()
        for weight in twin.parameters():
            weight.grad /= weight.grad.norm() + 1e-7 if normalised else 1
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for name, weight in own.named_parameters():
            right = dict(twin.named_parameters())[name]
            torch.testing.assert_close(weight.grad, right.grad, rtol=1e-3, atol=1e-6 if normalised else 1e-2, msg=name)
            assert not normalised or weight.grad.norm().item() == pytest.approx(1, abs=1e-4), name
        optimizer.step()
        for weight, right in zip(own.parameters(), twin.parameters(), strict=True):
            assert (weight - right).abs().mean() < 0.02 * lr             # of a step
            right.data.copy_(weight.data)                                # rounding is not to add up
    assert state.keys() == {"model", "optimizer", "generator"}
    assert torch.equal(state["generator"].get_state(), noise.get_state())


@pytest.mark.parametrize("kind", vampprior.PRIORS)
@pytest.mark.parametrize(("work", "model"), [("paper", "hvae"), ("port", "vae")])
def test_all_that_is_to_learn_changes_and_nothing_else(work, model, kind, images):
    own = make(work, model, kind, images=images, start="images" if work == "port" else "noise")
    before = copy.deepcopy(own.state_dict())
    step, _ = vampprior.training(own, generator(1), 1e-2)
    for _ in range(2):
        step(images[:20])
    learned = {name.removeprefix("prior.") for name, _ in own.named_parameters() if name.startswith("prior.")}
    assert learned == {"standard": set(), "vamp": {"u"}, "vamp-data": set(), "mog": {"means", "log_vars"}}[kind]
    same = {name for name, value in own.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"standard": {"prior.zero"}, "vamp-data": {"prior.u"}}.get(kind, set())
    assert own.done == 2


def test_training_raises_the_elbo(images):
    model = make(k=10, d=4, size=20)
    before = vampprior.evaluate(model, images[:500], generator(2))["elbo"].mean()
    step, _ = vampprior.training(model, generator(1), 3e-3, normalised=True)
    for t in range(60):
        step(images[20 * t:20 * t + 20])
    assert vampprior.evaluate(model, images[:500], generator(2))["elbo"].mean() > before + 100


# ------------------------------------------------------------------------------------------------ evaluation
@pytest.mark.parametrize("model", ["vae", "hvae"])
def test_evaluation_is_the_terms_of_every_image_in_parts(model, images):
    own = make(model=model)
    found, noise = vampprior.evaluate(own, images[:25], generator(3), rows=10), generator(3)
    terms = [torch.cat(parts).flatten().double() for parts in zip(
        *(own.terms(part.float() / 255, noise, own.components()) for part in images[:25].split(10)), strict=True)]
    kl = sum(terms[1:])
    expected = {"elbo": terms[0] - kl, "rec": terms[0], "kl": kl}
    if model == "hvae":
        expected |= {"kl_z2": terms[1], "kl_z1": terms[2]}
    assert found.keys() == expected.keys() and found["elbo"].dtype == torch.float64
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values.detach(), rtol=1e-5, atol=1e-4)
    looked = {name: value.item() for name, value in vampprior.validation(own, images[:10], generator(3))().items()}
    assert looked == pytest.approx({"val_loss": -expected["elbo"][:10].mean().item(),
                                    "val_rec": -expected["rec"][:10].mean().item(),
                                    "val_kl": expected["kl"][:10].mean().item()}, rel=1e-4)


@torch.no_grad()
def test_codes_are_draws_about_their_means_and_reconstructions_are_decoded_from_them(images):
    own, n = make(), 12
    found = vampprior.codes(own, images[:n], generator(3), rows=5)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (n, 2) for name in ("z2", "mean_z2", "z1", "mean_z1")}
    x = images[:n].float() / 255
    mean, log_var = own.encoder(x)
    torch.testing.assert_close(found["mean_z2"], mean)
    below, log_var1 = own.lower.posterior(own.lower.features(x), found["z2"])
    torch.testing.assert_close(found["mean_z1"], below)
    for z, m, v in (("z2", mean, log_var), ("z1", below, log_var1)):
        eps = (found[z] - m) / (0.5 * v).exp()
        assert 0.4 < eps.std() < 1.8 and eps.abs().max() < 4.5
    assert vampprior.codes(make(model="vae"), images[:n], generator(3)).keys() == {"z2", "mean_z2"}
    pairs, again = vampprior.reconstruct(own, images[:n], generator(3)), vampprior.codes(own, images[:n], generator(3))
    assert pairs.shape == (n, 2, 1, 28, 28) and torch.equal(pairs[:, 0], x)
    torch.testing.assert_close(pairs[:, 1], own.decoder(again["z2"], again["z1"]).sigmoid())


class Below(nn.Module):
    """p(z1|z2) = N(10 z2, 1/4)."""

    def prior(self, z2):
        return 10 * z2, torch.full_like(z2, math.log(0.25))


def far_apart(lower=None):
    """Four components of deviations 0.5, 1 and 2, fifty apart, before a decoder that notes its codes."""
    prior = vampprior.Mog(4, 2, generator(1))
    prior.means.data = torch.tensor([[100.0, 0], [-100, 0], [0, 50], [300, -300]])
    prior.log_vars.data = 2 * torch.tensor([[0.5, 1], [1, 2], [2, 0.5], [1, 1]]).log()
    return vampprior.VAE(prior, nn.Identity(), Reporter(), lower)


@pytest.mark.parametrize("lower", [None, Below()], ids=["vae", "hvae"])
def test_samples_are_of_the_models_own_mixture(lower):
    model, n = far_apart(lower), 20_250
    assert vampprior.sample(model, n, generator(1)).shape == (n, 1)
    z2, *z1 = (torch.cat(codes) for codes in zip(*model.decoder.seen, strict=True))
    means, log_vars = model.components()
    k = torch.cdist(z2, means).argmin(1)
    assert len(z2) == n and torch.cdist(z2, means).min(1).values.max() < 15
    for i in range(4):
        own = (z2[k == i] - means[i]) / (0.5 * log_vars[i]).exp()
        m = len(own)
        assert abs(m - n / 4) < 4 * math.sqrt(n * 3 / 16)
        assert (own.mean(0).abs() < 4 / m ** 0.5).all() and ((own.var(0) - 1).abs() < 4 * (2 / m) ** 0.5).all()
    if lower:
        own = (z1[0] - 10 * z2) / 0.5
        assert own.mean().abs() < 4 / (2 * n) ** 0.5 and (own.var() - 1).abs() < 4 * (1 / n) ** 0.5 + 1e-3
    else:
        assert not z1


@pytest.mark.parametrize("lower", [None, Below()], ids=["vae", "hvae"])
def test_the_ports_samples_are_of_unit_normals_whatever_the_prior(lower):
    """Known fault 10: in both layers, which are then independent."""
    model, n = far_apart(lower), 10_000
    vampprior.sample(model, n, generator(1), normal=True)
    z = torch.cat([torch.cat(codes) for codes in zip(*model.decoder.seen, strict=True)], 1)
    d = z.shape[1]
    assert z.shape == (n, 4 if lower else 2) and z.abs().max() < 6
    assert (z.mean(0).abs() < 4 / n ** 0.5).all() and (torch.cov(z.T) - torch.eye(d)).abs().max() < 5 * (2 / n) ** 0.5


def test_samples_are_the_decoders_means_and_follow_from_the_seed():
    model = make()
    found = vampprior.sample(model, 7, generator(1), rows=3)
    assert found.shape == (7, 1, 28, 28) and 0 < found.min() and found.max() < 1 and not found.requires_grad
    assert torch.equal(found, vampprior.sample(model, 7, generator(1), rows=3))
    assert not torch.equal(found, vampprior.sample(model, 7, generator(2), rows=3))
