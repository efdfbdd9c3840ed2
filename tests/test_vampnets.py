"""Networks of the VampPrior works: their parameters by the spec and by the paper's text, shapes, weights at first."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import vampnets, vampprior
from lib.train import generator

X = torch.linspace(0, 1, 3 * 784).view(3, 1, 28, 28)
MODELS = [*(("port", model) for model in ("vae", "hvae")), *(("paper", model) for model in ("vae", "hvae", "convhvae"))]
IMAGES = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model", "size", "standard"), [
    ("vae", 4, 1_974_501), ("vae", 16, 11_763_045), ("hvae", 4, 4_065_939), ("hvae", 16, 21_595_347)])
def test_the_ports_networks_have_its_parameters(model, size, standard):
    """The published eight; the standard prior's zeros are none, nor the counter of steps."""
    with torch.device("meta"):
        nets = vampnets.port(model, 2, size, "relu")
    for kind, expected in (("standard", standard), ("vamp", standard + 500 * 784), ("vamp-data", standard)):
        own = vampprior.prior(kind, 500, 2, "images", "hard-sigmoid", IMAGES, generator(1))
        assert count(vampprior.VAE(own, **nets)) == expected


def gated_dense(*widths):
    return sum(2 * (n + 1) * m for n, m in zip(widths, widths[1:], strict=False))


def gated_convolutions(*layers):
    return sum(2 * (kernel ** 2 * n + 1) * m for kernel, n, m in layers)


def test_the_papers_networks_have_its_parameters():
    """Its text: gated layers of 300 units, 40 dimensions a layer; the images meet the codes as 6 x 7 x 7 numbers."""
    d, h, pixels = 40, 300, 784
    heads, image = 2 * (h + 1) * d, (h + 1) * pixels
    vae = gated_dense(pixels, h, h) + heads + gated_dense(d, h, h) + image
    upper = gated_dense(d, h, h) + heads                                                     # p(z1|z2)
    hvae = (gated_dense(pixels, h, h) + heads + gated_dense(pixels, h) + gated_dense(d, h) + gated_dense(2 * h, h)
            + heads + upper + 2 * gated_dense(d, h) + gated_dense(2 * h, h) + image)
    width = 6 * 7 * 7
    convhvae = (gated_convolutions((7, 1, 32), (3, 32, 32), (5, 32, 64), (3, 64, 64), (3, 64, 6))
                + 2 * (width + 1) * d
                + gated_convolutions((3, 1, 32), (3, 32, 32), (3, 32, 64), (3, 64, 64), (3, 64, 6))
                + gated_dense(d, width) + gated_dense(2 * width, h) + heads + upper + 2 * gated_dense(d, h)
                + gated_dense(2 * h, pixels) + gated_convolutions((3, 1, 64), *[(3, 64, 64)] * 3) + 64 + 1)
    assert (vae, hvae, convhvae) == (1_116_864, 2_431_024, 2_210_861)
    for model, expected in (("vae", vae), ("hvae", hvae), ("convhvae", convhvae)):
        with torch.device("meta"):
            nets = vampnets.gated(model, d, h)
        own = vampprior.prior("vamp", 500, d, "noise", "clip", IMAGES, generator(1))
        assert count(vampprior.VAE(own, **nets)) == expected + 500 * 784
        assert sum(map(count, nets.values())) == expected


@pytest.mark.parametrize(("work", "model"), MODELS)
@pytest.mark.parametrize("scale", [1, 300])
def test_the_networks_map_images_to_codes_and_codes_to_logits(work, model, scale):
    """At weights of any size, log variances are in [-6, 2]; large ones reach both ends."""
    d, layers = 12, 1 if model == "vae" else 2
    nets = vampnets.gated(model, d, 8) if work == "paper" else vampnets.port(model, layers * d, 1, "elu")
    for net in nets.values():
        vampnets.initialise(net, "he", generator(1))
        for heads in (layer for layer in net.modules() if isinstance(layer, vampnets.Gaussian)):
            heads.log_var.weight.data *= scale
    gaussians, z2 = [nets["encoder"](X)], torch.randn(3, d, generator=generator(2))
    if "lower" in nets:
        lower = nets["lower"]
        gaussians += [lower.prior(z2), lower.posterior(lower.features(X), z2)]
    for mean, log_var in gaussians:
        assert mean.shape == log_var.shape == (3, d) and mean.dtype == log_var.dtype == torch.float32
        assert -6 <= log_var.min() and log_var.max() <= 2
    ends = torch.stack([log_var for _, log_var in gaussians])
    assert scale == 1 or (ends.min(), ends.max()) == (-6, 2)
    codes = (z2, gaussians[-1][0])[:layers]
    logits = nets["decoder"](*codes)
    assert logits.shape == (3, 1, 28, 28)
    for layer in range(layers):                                          # each layer's codes matter
        assert not torch.equal(nets["decoder"](*(z + (i == layer) for i, z in enumerate(codes))), logits)


def test_gated_layers_are_one_linear_map_times_the_sigmoid_of_another():
    h, x = torch.randn(5, 7, generator=generator(1)), torch.randn(2, 3, 9, 9, generator=generator(2))
    dense, conv = vampnets.GatedLinear(7, 4), vampnets.GatedConv2d(3, 4, 5, 2)
    a, b = (F.linear(h, dense.weight[rows], dense.bias[rows]) for rows in (slice(0, 4), slice(4, 8)))
    torch.testing.assert_close(dense(h), a * torch.sigmoid(b))
    a, b = (F.conv2d(x, conv.weight[rows], conv.bias[rows], 2, 2) for rows in (slice(0, 4), slice(4, 8)))
    torch.testing.assert_close(conv(x), a * torch.sigmoid(b))
    assert conv(x).shape == (2, 4, 5, 5)


def test_every_activation_is_another_function_with_the_same_weights():
    found = {}
    for name in vampnets.ACTIVATIONS:
        nets = vampnets.port("hvae", 2, 1, name)
        for net in nets.values():
            vampnets.initialise(net, "glorot", generator(1))
        z = nets["encoder"](X)[0]
        z1 = nets["lower"].posterior(nets["lower"].features(X), z)[0]
        found[name] = torch.cat([z.flatten(), z1.flatten(), nets["decoder"](z, z1).flatten()]).detach()
        assert found[name].isfinite().all(), name
    same = [{a, b} for a in found for b in found if a < b and torch.allclose(found[a], found[b], atol=1e-6)]
    assert same == [{"silu", "swish"}] and len(found) == 13
    assert {"relu", "elu", "selu", "tanh", "sigmoid", "softplus", "softsign", "linear"} < set(found)


# ------------------------------------------------------------------------------------------------ weights, complaints
@pytest.mark.parametrize(("how", "layer", "bound", "gaussian"), [
    ("glorot", nn.Linear(300, 200), math.sqrt(6 / 500), False),
    ("glorot", nn.Conv2d(8, 64, 5), math.sqrt(6 / (72 * 25)), False),
    ("glorot", nn.ConvTranspose2d(32, 64, 3), math.sqrt(6 / (96 * 9)), False),
    ("he", vampnets.GatedLinear(300, 200), math.sqrt(2 / 300), True),
    ("he", vampnets.GatedConv2d(8, 64, 5), 1 / math.sqrt(8 * 25), False)])
def test_weights_are_drawn_as_the_works_draw_them(how, layer, bound, gaussian):
    """Glorot & Bengio 2010, equation 16, and biases of 0; He et al. 2015 for dense layers, the rest as PyTorch does."""
    before = torch.get_rng_state()
    vampnets.initialise(nn.Sequential(layer), how, generator(1))
    weight, n = layer.weight.detach().clone(), layer.weight.numel()
    deviation = bound if gaussian else bound / math.sqrt(3)
    assert weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * n))
    assert abs(weight.mean().item()) < 4 * deviation / math.sqrt(n)
    kurtosis = (weight / deviation).pow(4).mean().item()
    assert kurtosis == pytest.approx(3 if gaussian else 9 / 5, rel=0.1)
    assert gaussian or 0.99 * bound < weight.abs().max() <= bound
    limit = 0 if how == "glorot" else 1 / math.sqrt(layer.weight[0].numel())
    assert 0.9 * limit <= layer.bias.abs().max() <= limit
    vampnets.initialise(layer, how, generator(1))
    assert torch.equal(layer.weight, weight) and torch.equal(torch.get_rng_state(), before)
    vampnets.initialise(layer, how, generator(2))
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: vampnets.port("convhvae", 2, 4, "relu"), "unknown model 'convhvae': use vae or hvae"),
    (lambda: vampnets.port("vae", 2, 4, "rleu"), "unknown activation 'rleu': use one of relu, elu,"),
    (lambda: vampnets.port("hvae", 3, 4, "relu"), "an hvae shares latent_dim .*: it must be even, got 3"),
    (lambda: vampnets.port("vae", 0, 4, "relu"), "latent_dim and network_size must be at least 1, got 0 and 4"),
    (lambda: vampnets.port("vae", 2, 0, "relu"), "latent_dim and network_size must be at least 1, got 2 and 0"),
    (lambda: vampnets.gated("hvea", 40, 300), "unknown model 'hvea': use vae, hvae or convhvae"),
    (lambda: vampnets.gated("vae", 0, 300), "latent_dim and hidden must be at least 1, got 0 and 300"),
    (lambda: vampnets.gated("vae", 40, 0), "latent_dim and hidden must be at least 1, got 40 and 0")])
def test_what_makes_no_network_is_refused_in_a_sentence(call, says):
    with pytest.raises(ValueError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
