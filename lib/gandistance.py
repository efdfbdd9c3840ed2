"""Images of the GAN's ground truth, of its reconstructions and of the models trained on it, compared (lib/dcgan.py).

A pair is an encoder with its decoder: "encoder_only", the encoder of stage 2 with the ground truth itself, and "joint",
both as stage 3 leaves them. Networks are in evaluation mode and full float32, whatever they were trained in.
"""
import math

import torch
from torch import Tensor

from lib import dcgan, inception
from lib.autoencoders import pixels
from lib.data import Dataset
from lib.evaluate import Moments, estimate, exact, frechet, moments
from lib.stochastic import diagonal_log_prob, reparameterise
from lib.train import precision
from lib.wasserstein import patch_swd, sliced_wasserstein

BATCH = 250


def samples(net: dcgan.Generator, n: int, noise: torch.Generator) -> Tensor:
    """Image means of n codes z ~ N(0, I): [n, 3, 64, 64] in [0, 1]."""
    z = torch.randn(n, net.nz, generator=noise, device=noise.device)
    return dcgan.generate(net, z).add(1).div(2).clamp(0, 1)


# ------------------------------------------------------------------------------------------------ distances
def distances(a: Tensor, b: Tensor, noise: torch.Generator, net=None, known: Moments | None = None) -> dict[str, dict]:
    """Distances of two independent sets of images, uint8 [n, 3, 64, 64] each.

    swd_64, swd_32, swd_16, swd: sliced Wasserstein distance of patches by scale, and their mean (`patch_swd`);
    sw_pixels: of whole images (`sliced_wasserstein`); with net, an `inception.load`, also fid, known: `moments_of` b.
    Sets that are compared with the generator in the same state are so along the same directions.
    """
    found = patch_swd(a, b, noise)
    found["swd"] = found.pop("swd_mean")
    found["sw_pixels"] = sliced_wasserstein(a, b, noise)
    if net is not None:
        found["fid"] = frechet(moments_of(a, net), known or moments_of(b, net), unit="FID")
    return found


def judge(where: torch.device):
    """The FID's Inception network if its weights are at hand, else None."""
    return inception.load(where) if inception.available() else None


def moments_of(images: Tensor, net) -> Moments | None:
    """Moments of the Inception network's features of uint8 images; None without a network."""
    return None if net is None else moments(inception.features(net, images), blocks=10)


def against_real(net: dcgan.Generator, images: Dataset, n: int, noise: torch.Generator) -> dict[str, dict]:
    """What celeba-gan measures of n generated images, or as many as there are test images.

    spread: root mean square deviation from their mean image; {distance}_real: of generated and test images,
    {distance}_floor: of training and test images, which is what real images reach.
    """
    n, device = min(n, len(images.test), len(images.train)), noise.device
    drawn, mean = generated(net, n, noise), 0
    for part in drawn.split(BATCH):
        mean = mean + part.double().sum(0) / n
    apart = torch.cat([(part - mean).square().mean((1, 2, 3)) for part in drawn.split(BATCH)]) / 127.5 ** 2
    metrics, state = {"spread": root(estimate(apart, "pixels in [-1, 1]"))}, noise.get_state()
    test, judging = images.test[:n].to(device), judge(device)
    known = moments_of(test, judging)
    for name, other in {"real": drawn, "floor": images.train[:n].to(device)}.items():
        noise.set_state(state)
        metrics |= {f"{key}_{name}": value for key, value in distances(other, test, noise, judging, known).items()}
    return metrics


def root(mean_square: dict) -> dict:
    """The metric's square root, its error by the delta method."""
    value = math.sqrt(mean_square["value"])
    se = mean_square["se"] / (2 * value) if mean_square["se"] and value else mean_square["se"]
    return {**mean_square, "value": value, "se": se}


def generated(net: dcgan.Generator, n: int, noise: torch.Generator, norm: str = "running") -> Tensor:
    """Image means of n codes z ~ N(0, I): uint8 [n, 3, 64, 64]."""
    z = torch.randn(n, net.nz, generator=noise, device=noise.device)
    return torch.cat([dcgan.to_uint8(dcgan.generate(net, part, norm)) for part in z.split(BATCH)])


@torch.no_grad()
def image_sets(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, noise: torch.Generator, norm: str = "running",
               sigma: float = dcgan.SIGMA) -> dict[str, Tensor]:
    """n images of the ground truth and of what each pair makes of them, uint8 [n, 3, 64, 64] each.

    "originals": G(z*), without noise; {name}: the mean of p(x|z) at one z ~ q(z|x), x drawn around G(z*);
    {name}_noise: the same with N(0, sigma^2) added, as CODE does for the joint model (known fault 5). norm: of all
    networks, see `dcgan.normalised`.
    """
    parts: dict[str, list[Tensor]] = {}
    nets = [truth, *(net for pair in pairs.values() for net in pair)]
    with dcgan.normalised(norm, *dict.fromkeys(nets)), precision("fp32", noise.device):
        for k in [min(BATCH, n - i) for i in range(0, n, BATCH)]:
            z, x = dcgan.draw(truth, k, noise, sigma)
            found = {"originals": dcgan.to_uint8(truth(z))}
            for name, (encoder, decoder) in pairs.items():
                decoded = _reconstructed(encoder, decoder, x, noise)
                found |= {name: dcgan.to_uint8(decoded), f"{name}_noise": dcgan.to_uint8(decoded, noise, sigma)}
            for name, images in found.items():
                parts.setdefault(name, []).append(images)
    return {name: torch.cat(images) for name, images in parts.items()}


def _reconstructed(encoder: dcgan.Encoder, decoder: dcgan.Generator, x: Tensor, noise: torch.Generator) -> Tensor:
    """The decoder's image means at one z ~ q(z|x) of each image x."""
    mean, log_sigma = encoder(x)
    return decoder(reparameterise(mean, 2 * log_sigma, noise))


def compare(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, noise: torch.Generator,
            sigma: float = dcgan.SIGMA) -> dict[str, dict]:
    """How far each pair's images are from the ground truth's: every distance of `distances`, {distance}_{name}{how}.

    Every set is compared with n images of the truth at codes of their own, not with the originals that it reconstructs:
    {distance}_floor, of those originals, is what images of the truth reach, and {distance}_samples is that of n images
    of the joint decoder at codes from N(0, I). how: "" networks in evaluation mode, no noise; "_noise": noise on the
    pair's images; "_batch1": all networks, also the truth, as in training at batch size 1; "_as_published": as CODE,
    that is "_batch1", and for the pair "joint" with noise as well (known fault 5).
    """
    sets = image_sets(truth, pairs, n, noise, sigma=sigma)
    sets["floor"] = sets.pop("originals")
    if "joint" in pairs:
        sets["samples"] = generated(pairs["joint"][1], n, noise)
    single = image_sets(truth, pairs, n, noise, "batch-1", sigma)
    state, judging = noise.get_state(), judge(noise.device)
    by_one = {f"{name}_batch1": single[name] for name in pairs}
    if "joint" in pairs:
        by_one["joint_as_published"] = single["joint_noise"]
    metrics = {}
    for norm, compared in (("running", sets), ("batch-1", by_one)):
        noise.set_state(state)
        reference = generated(truth, n, noise, norm)
        known, after = moments_of(reference, judging), noise.get_state()
        for name, own in compared.items():
            noise.set_state(after)
            metrics |= {f"{k}_{name}": value for k, value in distances(own, reference, noise, judging, known).items()}
    return metrics | {name.replace("_batch1", "_as_published"): metric for name, metric in metrics.items()
                      if name.endswith("_encoder_only_batch1")}               # CODE adds no noise there


@torch.no_grad()
def features(discriminator: dcgan.Discriminator, sets: dict[str, Tensor]) -> dict[str, dict]:
    """feature_{name}: squared error of the GAN's discriminator's features of reconstructions, one by one.

    sets: of `image_sets`; the error is in units of the originals' variance (1: as far as their mean, 2: as far as
    another image), the features are those before the last layer [8 ndf, 4, 4].
    """
    def of(images: Tensor) -> Tensor:
        return torch.cat([discriminator.trunk(pixels(part)).flatten(1).float() for part in images.split(BATCH)])

    with dcgan.normalised("running", discriminator), precision("fp32", sets["originals"].device):
        known = of(sets["originals"])
        variance = (known - known.mean(0)).square().sum(1).mean()
        return {f"feature_{name}": estimate((of(images) - known).square().sum(1) / variance, "of the variance")
                for name, images in sets.items() if name != "originals" and not name.endswith("_noise")}


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
            decoded, rec, kl, mean, log_sigma = dcgan.elbo_terms(encoder, decoder, x, noise, sigma)
            found = {"elbo": rec - kl, "rec": rec, "kl": kl, "log_q": diagonal_log_prob(z, mean, 2 * log_sigma),
                     "mse": (decoded - truth(z)).square().flatten(1).mean(1),
                     "code_error": (z - mean).square().mean(1)}
            for name, value in found.items():
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


UNITS = {"elbo": "nats per image", "rec": "nats per image", "kl": "nats per image", "log_q": "nats per image",
         "mse": "squared error per pixel", "code_error": "squared error per dimension"}


def likelihoods(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, noise: torch.Generator,
                sigma: float = dcgan.SIGMA) -> dict[str, dict]:
    """Mean and error of every term of `terms` for each pair {name: (encoder, decoder)}, as {term}_{name}.

    All pairs see the same images. elbo_gain, of two pairs: the second's ELBO less the first's, image by image; ceiling:
    E log p*(x|z*), which no ELBO can pass: log p*(x) is lower still by the mutual information of x and z.
    """
    state, metrics, elbos = noise.get_state(), {}, []
    for name, (encoder, decoder) in pairs.items():
        noise.set_state(state)
        found = terms(truth, encoder, decoder, n, noise, sigma)
        metrics |= {f"{term}_{name}": estimate(value, UNITS[term]) for term, value in found.items()}
        elbos.append(found["elbo"].double())
    if len(elbos) == 2:
        metrics["elbo_gain"] = estimate(elbos[1] - elbos[0], UNITS["elbo"])
    return metrics | {"ceiling": exact(ceiling(sigma), "nats per image")}


def ceiling(sigma: float = dcgan.SIGMA, dimensions: int = 3 * 64 * 64) -> float:
    """E log N(x; G(z), sigma^2 I) for x drawn from it, nats per image: minus the noise's entropy."""
    return -0.5 * dimensions * math.log(2 * math.pi * math.e * sigma ** 2)


def drift(truth: dcgan.Generator, decoder: dcgan.Generator, n: int, noise: torch.Generator) -> dict:
    """Root mean square difference, pixels in [-1, 1], of two decoders' images at the same n codes z ~ N(0, I)."""
    z = torch.randn(n, truth.nz, generator=noise, device=noise.device)
    apart = [(dcgan.generate(truth, part) - dcgan.generate(decoder, part)).square().flatten(1).mean(1)
             for part in z.split(BATCH)]
    return root(estimate(torch.cat(apart), "pixels in [-1, 1]"))


@torch.no_grad()
def reconstructions(truth: dcgan.Generator, pairs: dict[str, tuple], n: int, noise: torch.Generator,
                    sigma: float = dcgan.SIGMA) -> dict[str, Tensor]:
    """n images of the truth, as drawn with their noise, and each pair's reconstructions: [n, 3, 64, 64] in [0, 1]."""
    with dcgan.normalised("running", truth), precision("fp32", noise.device):
        z, x = dcgan.draw(truth, n, noise, sigma)
        found = {"G(z)": truth(z), "x": x}
    for name, (encoder, decoder) in pairs.items():
        with dcgan.normalised("running", encoder, decoder), precision("fp32", noise.device):
            found[name] = _reconstructed(encoder, decoder, x, noise)
    return {name: images.add(1).div(2).clamp(0, 1) for name, images in found.items()}


def headline(*found: dict) -> list[str]:
    """The names of celeba-fid's metrics that a table shows: of those that at least one of the dicts has, in order."""
    names = [f"{key}_{pair}" for key in ("elbo", "rec", "kl", "mse", "feature", "fid", "swd", "swd_64", "swd_32",
                                         "swd_16", "sw_pixels") for pair in ("encoder_only", "joint")]
    names[2:2] = ["elbo_gain", "ceiling"]
    names += [f"{key}_{name}" for key in ("fid", "swd") for name in ("floor", "samples")]
    names += [f"{key}_{pair}_as_published" for key in ("fid", "swd") for pair in ("encoder_only", "joint")] + ["drift"]
    return [name for name in names if any(name in one for one in found)]
