"""Images of the GAN's ground truth, of its reconstructions and of the models trained on it, compared (lib/dcgan.py).

A pair is an encoder with its decoder: "encoder_only", the encoder of stage 2 with the ground truth itself, and "joint",
both as stage 3 leaves them. Networks are in evaluation mode and full float32, whatever they were trained in.
"""
import math

import torch
from torch import Tensor

from lib import dcgan
from lib.data import Dataset
from lib.evaluate import estimate, exact
from lib.stochastic import diagonal_log_prob, gaussian_kl, gaussian_log_prob, reparameterise
from lib.train import precision

BATCH = 250


def samples(net: dcgan.Generator, n: int, noise: torch.Generator) -> Tensor:
    """Image means of n codes z ~ N(0, I): [n, 3, 64, 64] in [0, 1]."""
    z = torch.randn(n, net.nz, generator=noise, device=noise.device)
    return dcgan.generate(net, z).add(1).div(2).clamp(0, 1)


def against_real(net: dcgan.Generator, images: Dataset, n: int, noise: torch.Generator) -> dict[str, dict]:
    """What celeba-gan measures of n generated images."""
    drawn = samples(net, min(n, len(images.test)), noise)
    spread = (drawn - drawn.mean(0)).square().mean().sqrt()
    return {"spread": exact(spread, "of the pixels' range")}


# ------------------------------------------------------------------------------------------------ likelihoods
@torch.no_grad()
def terms(truth: dcgan.Generator, encoder: dcgan.Encoder, decoder: dcgan.Generator, n: int, noise: torch.Generator,
          sigma: float = dcgan.SIGMA) -> dict[str, Tensor]:
    """Per-image terms of a pair on n images of the ground truth, float32 [n] each, in nats per image but the last two.

    elbo = rec - kl: log p(x|z) at one draw z ~ q(z|x) less KL(q(z|x) || N(0, I)); log_q: log q(z*|x) of the code z*
    that x was drawn from; mse: squared error per pixel of the reconstruction, at the drawn z, of the noiseless G(z*);
    code_error: squared error per dimension of q's mean for z*. The same noise draws the same images for every pair.
    """
    parts: dict[str, list[Tensor]] = {}
    with dcgan.normalised("running", truth, encoder, decoder), precision("fp32", noise.device):
        for k in [min(BATCH, n - i) for i in range(0, n, BATCH)]:
            z, x = dcgan.draw(truth, k, noise, sigma)
            mean, log_sigma = encoder(x)
            decoded = decoder(reparameterise(mean, 2 * log_sigma, noise))
            rec, kl = gaussian_log_prob(x, decoded, math.log(sigma)), gaussian_kl(mean, 2 * log_sigma)
            found = {"elbo": rec - kl, "rec": rec, "kl": kl, "log_q": diagonal_log_prob(z, mean, 2 * log_sigma),
                     "mse": (decoded - truth(z)).square().flatten(1).mean(1),
                     "code_error": (z - mean).square().mean(1)}
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


UNITS = {"elbo": "nats per image", "rec": "nats per image", "kl": "nats per image", "log_q": "nats per image",
         "mse": "squared error per pixel", "code_error": "squared error per dimension"}


def likelihoods(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, seed: torch.Generator,
                sigma: float = dcgan.SIGMA) -> dict[str, dict]:
    """Mean and error of every term of `terms` for each pair {name: (encoder, decoder)}, as {term}_{name}.

    All pairs see the same images. ceiling: E log p*(x|z*), which no ELBO can pass: log p*(x) is lower still by the
    mutual information of x and z.
    """
    state, metrics = seed.get_state(), {}
    for name, (encoder, decoder) in pairs.items():
        seed.set_state(state)
        found = terms(truth, encoder, decoder, n, seed, sigma)
        metrics |= {f"{term}_{name}": estimate(value, UNITS[term]) for term, value in found.items()}
    return metrics | {"ceiling": exact(ceiling(sigma), "nats per image")}


def ceiling(sigma: float = dcgan.SIGMA, dimensions: int = 3 * 64 * 64) -> float:
    """E log N(x; G(z), sigma^2 I) for x drawn from it, nats per image: minus the noise's entropy."""
    return -0.5 * dimensions * math.log(2 * math.pi * math.e * sigma ** 2)


def drift(truth: dcgan.Generator, decoder: dcgan.Generator, n: int, noise: torch.Generator) -> dict:
    """Squared difference per pixel of the two decoders' images at the same z ~ N(0, I), as a metric over n codes."""
    z = torch.randn(n, truth.nz, generator=noise, device=noise.device)
    apart = [(dcgan.generate(truth, part) - dcgan.generate(decoder, part)).square().flatten(1).mean(1)
             for part in z.split(BATCH)]
    return estimate(torch.cat(apart), UNITS["mse"])


@torch.no_grad()
def reconstructions(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, seed: torch.Generator,
                    sigma: float = dcgan.SIGMA) -> dict[str, Tensor]:
    """n images of the truth, as drawn with their noise, and each pair's reconstructions: [n, 3, 64, 64] in [0, 1]."""
    with dcgan.normalised("running", truth), precision("fp32", seed.device):
        z, x = dcgan.draw(truth, n, seed, sigma)
        found = {"G(z)": truth(z), "x": x}
    for name, (encoder, decoder) in pairs.items():
        with dcgan.normalised("running", encoder, decoder), precision("fp32", seed.device):
            mean, log_sigma = encoder(x)
            found[name] = decoder(reparameterise(mean, 2 * log_sigma, seed))
    return {name: images.add(1).div(2).clamp(0, 1) for name, images in found.items()}
