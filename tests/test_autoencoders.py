"""The five autoencoders: parameter counts, losses and ELBO against direct float64 formulas, what each step moves."""
import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from lib import autoencoders, data, train
from lib.evaluate import mmd

IMAGES = data.load("digits", size=32)


def count(module):
    """Trainable parameters of a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def make(kind, dim=4, lr=1e-3, **options):
    """A small model of the kind with its step and state."""
    model = autoencoders.Autoencoder(kind, (1, 32), dim=dim, sigma=options.pop("sigma", 1.0))
    model.initialise(train.generator(1))
    step, state = autoencoders.training(model, train.generator(2), lr, **options)
    return model, step, state


def test_parameter_counts_are_the_works():
    mnist = autoencoders.Autoencoder("aae", (1, 32), 2, 32, (1, 2, 4))
    assert [count(m) for m in (mnist.encoder, mnist.decoder, mnist.discriminator)] == [444_260, 169_121, 1_185]
    celeba = autoencoders.Autoencoder("vae", (3, 64), 128, 64, (1, 2, 4, 8))
    assert [count(m) for m in (celeba.encoder, celeba.decoder)] == [7_282_624, 3_807_043]
    assert celeba.encoder(torch.zeros(2, 3, 64, 64))[0].shape == (2, 128)
    assert celeba.decoder(torch.zeros(2, 128)).shape == (2, 3, 64, 64)


def test_initial_weights_have_the_works_deviations_and_depend_on_the_generator_only():
    model = autoencoders.Autoencoder("vae", (1, 32)).initialise(train.generator(1))
    convolution, norm = model.encoder.trunk[-2], model.encoder.mean[1]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.02) and convolution.bias.abs().max() == 0
    assert norm.weight.mean().item() == pytest.approx(1, abs=0.01)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.3)
    again = autoencoders.Autoencoder("vae", (1, 32)).initialise(train.generator(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def replay(model, seed=2):
    """x, z, mean, log variance and decoded images of the first step, recomputed in float64 from the same noise."""
    x = autoencoders.pixels(IMAGES.train[:16])
    noise = torch.randn(16, 2, generator=train.generator(seed))
    double = autoencoders.Autoencoder(model.kind, (1, 32), dim=4).double().train()
    double.load_state_dict(model.state_dict())
    mean, log_var = double.encoder(x.double())
    z = mean + noise.double() * torch.exp(log_var / 2) if model.variational else mean
    return x.double(), z, mean, log_var, double.decoder(z)


@pytest.mark.parametrize("kind", ["ae", "vae", "beta-vae", "mmd-vae"])
def test_losses_are_the_works_formulas(kind):
    model, step, _ = make(kind, beta=20.0, alpha=0.7, lambda_=2.0)
    x, z, mean, log_var, decoded = replay(model)
    rec = ((x - decoded) ** 2).mean()
    kl = (mean ** 2 + log_var.exp() - log_var - 1).sum(1).mean() / 1024
    if kind == "mmd-vae":
        noise = train.generator(2)
        torch.randn(16, 2, generator=noise)                     # the draw that made z
        divergence = mmd(torch.randn(16, 2, generator=noise).double(), z)
        expected = rec + 0.3 * kl + 1.7 * divergence
    else:
        expected = rec + {"ae": 0.0, "vae": 1.0, "beta-vae": 20.0}[kind] * kl
    metrics = step(IMAGES.train[:16])
    assert metrics["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["rec"].item() == pytest.approx(rec.item(), rel=1e-5)
    if kind != "ae":
        assert metrics["kl"].item() == pytest.approx(512 * kl.item(), rel=1e-4)


@pytest.mark.parametrize(("sigma", "learn"), [(1.0, False), (0.3, False), (0.5, True)])
def test_the_loss_is_the_gaussian_elbo_up_to_scale_and_constant(sigma, learn):
    """Known fault 7: (pixels / 2) loss = -ELBO - (pixels / 2) log 2 pi, for every sigma."""
    model, step, _ = make("vae", sigma=sigma, learn_sigma=learn)
    x, z, mean, log_var, decoded = replay(model)
    likelihood = Independent(Normal(decoded, sigma), 3).log_prob(x)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    divergence = kl_divergence(Normal(mean, torch.exp(log_var / 2)), prior).sum(1)
    elbo = (likelihood - divergence).mean().item()
    assert 512 * step(IMAGES.train[:16])["loss"].item() == pytest.approx(-elbo - 512 * math.log(2 * math.pi), rel=1e-4)
    assert (model.log_sigma.exp().item() != pytest.approx(sigma, abs=1e-6)) == learn


def test_the_test_elbo_is_the_distributions_own():
    model, step, _ = make("vae", sigma=0.4)
    for t in range(5):
        step(IMAGES.train[32 * t:32 * t + 32])
    terms = autoencoders.evaluate(model, IMAGES.test[:50], train.generator(9), batch_size=50)
    x = autoencoders.pixels(IMAGES.test[:50])
    with torch.no_grad():
        mean, log_var = model.encoder(x)
        q = Normal(mean, torch.exp(log_var / 2))
        likelihood = Independent(Normal(model.decoder(terms["z"]), 0.4), 3).log_prob(x)
        elbo = likelihood - kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    torch.testing.assert_close(terms["elbo"], elbo, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(autoencoders.elbo_at(0.4, terms["mse"], terms["kl"], 1024), elbo, rtol=1e-4, atol=1e-2)
    best = terms["mse"].mean().sqrt().item()
    at = {sigma: autoencoders.elbo_at(sigma, terms["mse"], terms["kl"], 1024).mean().item()
          for sigma in (best, 0.95 * best, 1.05 * best, 1.0)}
    assert max(at, key=at.get) == best


def test_evaluation_does_not_depend_on_its_batches_and_uses_running_statistics():
    model, step, _ = make("ae")
    step(IMAGES.train[:64])
    whole, parts = (autoencoders.evaluate(model, IMAGES.test[:20], train.generator(1), size)["mse"] for size in (20, 3))
    torch.testing.assert_close(whole, parts)


def moved(model, step):
    """Names of the parts that one step changes."""
    before = {name: value.clone() for name, value in model.named_parameters()}
    step(IMAGES.train[:16])
    return {name.split(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def test_each_step_moves_what_it_should():
    for kind in ("ae", "vae", "mmd-vae"):
        assert moved(*make(kind)[:2]) == {"encoder", "decoder"}
    assert moved(*make("aae")[:2]) == {"encoder", "decoder", "discriminator"}
    assert moved(*make("vae", learn_sigma=True)[:2]) == {"encoder", "decoder", "log_sigma"}


def test_the_aae_alternates_reconstruction_discriminator_and_encoder():
    """One step against three hand-written ones in float64 with the same noise."""
    model, step, _ = make("aae")
    hand = autoencoders.Autoencoder("aae", (1, 32), dim=4).double().train()
    hand.load_state_dict(model.state_dict())
    x = autoencoders.pixels(IMAGES.train[:16]).double()
    optimizer = torch.optim.Adam([*hand.encoder.parameters(), *hand.decoder.parameters()], 1e-3)
    judge = torch.optim.Adam(hand.discriminator.parameters(), 1e-3)
    rec = ((hand.decoder(hand.encoder(x)[0]) - x) ** 2).mean()
    rec.backward()
    optimizer.step()
    optimizer.zero_grad()
    z = hand.encoder(x)[0]
    normal = torch.randn(16, 2, generator=train.generator(2)).double()
    real, fake = torch.sigmoid(hand.discriminator(normal)), torch.sigmoid(hand.discriminator(z.detach()))
    disc = -(real.log() + (1 - fake).log()).mean() / 2
    disc.backward()
    judge.step()
    adversarial = -torch.sigmoid(hand.discriminator(z)).log().mean()
    adversarial.backward()
    optimizer.step()
    metrics = step(IMAGES.train[:16])
    for name, value in {"rec": rec, "discriminator": disc, "adversarial": adversarial}.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4)
    for name, value in hand.discriminator.named_parameters():
        torch.testing.assert_close(model.discriminator.get_parameter(name).double(), value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", autoencoders.KINDS)
def test_training_lowers_the_reconstruction_error(kind):
    model, step, state = make(kind, dim=8, lr=3e-3)
    history = train.fit(step, train.Shuffled(IMAGES.train, 32, 1), steps=60, state=state, config={}, log_every=10)
    assert history["rec"][-1] < 0.7 * history["rec"][0]


def test_code_statistics_and_measure():
    mean = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).repeat(20, 1)
    labels = torch.tensor([0, 1]).repeat(20)
    found = autoencoders.code_statistics(mean, mean, labels, labels)
    assert found["code_centre"]["value"] == pytest.approx(2) and found["code_radius_99"]["value"] == pytest.approx(3)
    assert found["code_spread"]["value"] == pytest.approx(math.sqrt(40 / 39 / 2), rel=1e-5)
    assert found["knn_accuracy"]["value"] == 1
    names = {kind: set(autoencoders.measure(make(kind)[0], IMAGES, train.generator(1), 100)) for kind in ("ae", "vae")}
    assert names["vae"] - names["ae"] == {"kl", "elbo", "elbo_best_sigma", "sigma"}


@pytest.mark.parametrize(("call", "message"), [
    (lambda: autoencoders.Autoencoder("gan", (1, 32)), "unknown model 'gan'"),
    (lambda: autoencoders.Autoencoder("vae", (1, 28)), "need images of side 32, got 28"),
    (lambda: autoencoders.Autoencoder("vae", (1, 32), z_dim=0), "z_dim >= 1"),
    (lambda: autoencoders.Autoencoder("vae", (1, 32), sigma=0.0), "sigma > 0"),
    (lambda: make("vae", lr=0.0), "learning rate must be positive"),
    (lambda: make("ae", learn_sigma=True), "learn_sigma needs a vae"),
    (lambda: make("mmd-vae", kernel="cubic")[1](IMAGES.train[:4]), "unknown kernel 'cubic'")])
def test_wrong_arguments_are_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
