"""Not a test: a small VampPrior model and two helpers, for the tests of lib/vampprior.py."""
import torch

from lib import vampnets, vampprior
from lib.train import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def make(work="paper", model="hvae", kind="vamp", k=4, d=2, start="noise", images=None, seed=1, size=6):
    """A small model, d dimensions a layer, images: what pseudo-inputs may start as."""
    weights = generator(seed, use="weights")
    layers = 2 if model == "hvae" else 1
    nets = vampnets.gated(model, d, size) if work == "paper" else vampnets.port(model, layers * d, 1, "elu")
    for net in nets.values():
        vampnets.initialise(net, "he" if work == "paper" else "glorot", weights)
    images = torch.zeros(k, 1, 28, 28, dtype=torch.uint8) if images is None else images
    own = vampprior.prior(kind, k, d, start, "clip" if work == "paper" else "hard-sigmoid", images, weights)
    return vampprior.VAE(own, **nets)


def within(samples, expected, errors=4):
    """Whether the mean of independent samples is the expected one, as far as their spread can tell."""
    samples = samples.double()
    return (samples.mean() - expected).abs().item() < errors * samples.std().item() / len(samples) ** 0.5
