"""AE, VAE, beta-VAE, AAE and MMD-VAE on one convolutional encoder/decoder family (VAEs-Implementations).

Pixels x in [-1, 1], latent code z. Losses are per pixel, as the work computes them (known fault 7 says what they mean):
rec = mean squared error, kl = sum over z of (mu^2 + var - log var - 1) / pixels = 2 KL(q(z|x) || N(0, I)) / pixels.
    AE       rec                                      the code is the mean
    VAE      rec / sigma^2 + 2 log sigma + kl         beta-VAE: beta * kl
    AAE      rec, then a discriminator on z against N(0, I), then the encoder against the discriminator
    MMD-VAE  rec + (1 - alpha) kl + (alpha + lambda - 1) MMD(z, N(0, I))
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data import Dataset
from lib.evaluate import KERNELS, estimate, exact, mmd, mmd_unbiased
from lib.stochastic import gaussian_kl, gaussian_log_prob, reparameterise
from lib.train import adam, precision

KINDS = ("ae", "vae", "beta-vae", "aae", "mmd-vae")
VARIATIONAL = ("vae", "beta-vae", "mmd-vae")
CURVES = {"squared error per pixel": {"rec": "reconstruction"}, "KL [nats per image]": {"kl": "KL"},
          "squared MMD": {"mmd": "MMD"},
          "cross-entropy [nats]": {"discriminator": "discriminator", "adversarial": "encoder"}}
METRICS = ("mse", "kl", "elbo", "elbo_best_sigma", "sigma", "best_sigma", "mmd_original", "mmd_gaussian", "code_centre",
           "code_spread", "code_radius_99", "knn_accuracy")
METRICS_64 = ("mse", "kl", "active_units", "elbo", "elbo_best_sigma", "best_sigma", "mmd_original", "mmd_gaussian",
              "sharpness_samples", "sharpness_reconstructions", "diversity_samples", "diversity_reconstructions")
LEARNT_FROM = ("model", "dataset", "batch_size", "lr", "beta", "sigma", "learn_sigma", "mmd_alpha", "mmd_lambda",
               "kernel", "z_dim", "seed", "precision")    # the notebook's parameters that the weights depend on
LEARNT_FROM_64 = (*LEARNT_FROM, "dim", "crop", "flip")    # and those of celeba-autoencoders
MULTIPLIERS = {32: (1, 2, 4), 64: (1, 2, 4, 8)}           # the work's, by the side of the images

USED_BY = {"beta": ("beta-vae",), "sigma": VARIATIONAL, "learn_sigma": ("vae", "beta-vae"), "mmd_alpha": ("mmd-vae",),
           "mmd_lambda": ("mmd-vae",), "kernel": ("mmd-vae",)}


def check_used(kind: str, changed) -> None:
    """Raise ValueError if one of the changed parameters (names) has no meaning for this kind of model."""
    for name in changed:
        if kind not in USED_BY.get(name, (kind,)):
            raise ValueError(f"parameter {name} does nothing for model {kind!r}: it is for {', '.join(USED_BY[name])}")


def check_sizes(steps: int, batch_size: int) -> None:
    """Raise ValueError for numbers that cannot be trained with: batch normalisation needs two images."""
    if steps < 0 or batch_size < 2:
        raise ValueError(f"steps >= 0 and batch_size >= 2 are needed, got {steps} and {batch_size}")


class Encoder(nn.Module):
    """x [B, C, S, S] -> mean and log variance of q(z|x), each [B, z_dim]; S = 4 * 2^len(multipliers)."""

    def __init__(self, channels: int, z_dim: int, dim: int, multipliers: tuple[int, ...]):
        super().__init__()
        widths = [dim * m for m in multipliers]
        layers = [nn.Conv2d(channels, widths[0], 4, 2, 1)]
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.BatchNorm2d(before)] if i else []
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(before, after, 4, 2, 1)]
        top = widths[-1]
        layers += [nn.BatchNorm2d(top), nn.LeakyReLU(0.2), nn.Conv2d(top, top, 4), nn.Flatten()]
        self.trunk = nn.Sequential(*layers)
        self.mean, self.log_var = (nn.Sequential(nn.Linear(top, top // 2), nn.BatchNorm1d(top // 2), nn.LeakyReLU(0.01),
                                                 nn.Linear(top // 2, z_dim)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, z_dim]."""
        h = self.trunk(x)
        return self.mean(h), self.log_var(h)


class Decoder(nn.Module):
    """z [B, z_dim] -> image mean [B, C, S, S] in [-1, 1], the encoder mirrored."""

    def __init__(self, channels: int, z_dim: int, dim: int, multipliers: tuple[int, ...]):
        super().__init__()
        widths = [dim * m for m in reversed(multipliers)]
        layers = [nn.ConvTranspose2d(z_dim, widths[0], 4)]
        for before, after in pairwise([*widths, channels]):
            layers += [nn.BatchNorm2d(before), nn.LeakyReLU(0.2), nn.ConvTranspose2d(before, after, 4, 2, 1)]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Image mean [B, C, S, S]."""
        return self.net(z[:, :, None, None])


class Autoencoder(nn.Module):
    """Encoder, decoder, the decoder's log sigma and, for the AAE, the discriminator on z.

    image (C, S): channels and side. MNIST: (1, 32), z_dim 2, dim 32, multipliers (1, 2, 4); CelebA: (3, 64), 128, 64,
    (1, 2, 4, 8). All weights N(0, 0.02), norm weights N(1, 0.02), biases 0.
    Raises ValueError: unknown kind, or a side that the multipliers do not reduce to 4.
    """

    def __init__(self, kind: str, image: tuple[int, int], z_dim: int = 2, dim: int = 32,
                 multipliers: tuple[int, ...] = (1, 2, 4), sigma: float = 1.0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown model {kind!r}: use one of {', '.join(KINDS)}")
        side = 4 * 2 ** len(multipliers)
        if image[1] != side:
            raise ValueError(f"{len(multipliers)} multipliers need images of side {side}, got {image[1]}")
        if z_dim < 1 or dim < 2 or sigma <= 0:
            raise ValueError(f"z_dim >= 1, dim >= 2 and sigma > 0 are needed, got {z_dim}, {dim} and {sigma}")
        self.kind, self.z_dim = kind, z_dim
        self.encoder = Encoder(image[0], z_dim, dim, multipliers)
        self.decoder = Decoder(image[0], z_dim, dim, multipliers)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)), requires_grad=False)
        if kind == "aae":
            self.discriminator = nn.Sequential(nn.Linear(z_dim, 32), nn.LeakyReLU(0.2), nn.Linear(32, 32),
                                               nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def initialise(self, generator: torch.Generator) -> "Autoencoder":
        """Draw all weights from the generator (on the CPU, so that every device starts alike); returns self."""
        for module in self.modules():
            weight = getattr(module, "weight", None)
            if weight is not None:
                norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
                nn.init.normal_(weight, 1.0 if norm else 0.0, 0.02, generator=generator)
                nn.init.zeros_(module.bias)
        return self

    @property
    def variational(self) -> bool:
        """True if q(z|x) is a distribution (VAE, beta-VAE, MMD-VAE); AE and AAE use the mean as the code."""
        return self.kind in VARIATIONAL

    def code(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, C, S, S] -> (z, mean, log variance), each [B, z_dim]; z is a draw if variational, else the mean."""
        mean, log_var = (output.float() for output in self.encoder(x))      # bf16 would be too coarse for the losses
        return (reparameterise(mean, log_var, generator) if self.variational else mean), mean, log_var


def pixels(images: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def training(model: Autoencoder, generator: torch.Generator, lr: float = 1e-3, beta: float = 20.0, alpha: float = 1.0,
             lambda_: float = 1.0, kernel: str = "original", learn_sigma: bool = False, augment=None) -> tuple:
    """The step of the model's kind and the state it changes: (step, {name: item}) for `train.fit`.

    beta weighs the KL of the beta-VAE (1 in the VAE); alpha, lambda_ and kernel are the MMD-VAE's; learn_sigma trains
    the decoder's sigma; augment(images, generator) -> images changes each batch first, e.g. celeba.flip. The step takes
    uint8 images and returns loss, rec (per pixel, [-1, 1] scale), kl (nats per
    image) and its own terms. Raises ValueError: lr not positive, or learn_sigma without a (beta-)VAE.
    """
    if learn_sigma and model.kind not in ("vae", "beta-vae"):
        raise ValueError(f"learn_sigma needs a vae or beta-vae, not {model.kind}")
    model.train().to(memory_format=torch.channels_last)
    model.log_sigma.requires_grad_(learn_sigma)
    beta = beta if model.kind == "beta-vae" else 1.0
    optimizer = adam([*model.encoder.parameters(), *model.decoder.parameters(), *[model.log_sigma] * learn_sigma], lr)
    state = {"model": model, "optimizer": optimizer, "generator": generator}
    prepared = (lambda batch: pixels(augment(batch, generator))) if augment else pixels
    if model.kind == "aae":
        state["discriminator_optimizer"] = adam(model.discriminator.parameters(), lr)
        return _adversarial_step(model, optimizer, state["discriminator_optimizer"], generator, prepared), state

    def losses(x: Tensor) -> dict[str, Tensor]:
        z, mean, log_var = model.code(x, generator)
        rec = F.mse_loss(model.decoder(z).float(), x)
        if model.kind == "ae":
            return {"loss": rec, "rec": rec}
        kl = gaussian_kl(mean, log_var).mean()
        per_pixel = 2 * kl / x[0].numel()
        if model.kind == "mmd-vae":
            divergence = mmd(torch.randn(z.shape, generator=generator, device=z.device), z, kernel)
            loss = rec + (1 - alpha) * per_pixel + (alpha + lambda_ - 1) * divergence
            return {"loss": loss, "rec": rec, "kl": kl, "mmd": divergence}
        loss = rec * torch.exp(-2 * model.log_sigma) + 2 * model.log_sigma + beta * per_pixel
        return {"loss": loss, "rec": rec, "kl": kl, "sigma": model.log_sigma.exp()}

    def step(batch: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        metrics = losses(prepared(batch))
        metrics["loss"].backward()
        optimizer.step()
        return metrics

    return step, state


def _adversarial_step(model: Autoencoder, optimizer, discriminator_optimizer, generator, prepared):
    """One AAE step: reconstruction, discriminator, encoder as generator (Makhzani et al. 2015, section 2)."""
    score, bce = model.discriminator, F.binary_cross_entropy_with_logits

    def step(batch: Tensor) -> dict[str, Tensor]:
        x = prepared(batch)
        optimizer.zero_grad()
        rec = F.mse_loss(model.decoder(model.encoder(x)[0]), x)
        rec.backward()
        optimizer.step()

        optimizer.zero_grad()
        z, _ = model.encoder(x)
        real, fake = score(torch.randn(z.shape, generator=generator, device=z.device)), score(z.detach())
        disc = (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2
        discriminator_optimizer.zero_grad()
        disc.backward()
        discriminator_optimizer.step()

        fake = score(z)
        adversarial = bce(fake, torch.ones_like(fake))
        adversarial.backward()
        optimizer.step()
        return {"loss": rec, "rec": rec, "discriminator": disc, "adversarial": adversarial}

    return step


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def encode(model: Autoencoder, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] -> mean and log variance [N, z_dim], the network in evaluation mode."""
    model.eval()
    with precision("fp32", images.device):
        parts = [model.encoder(pixels(part)) for part in images.split(batch_size)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([log_var for _, log_var in parts])


@torch.no_grad()
def decode(model: Autoencoder, z: Tensor, batch_size: int = 500) -> Tensor:
    """z [N, z_dim] -> images [N, C, S, S] in [0, 1], the network in evaluation mode."""
    model.eval()
    with precision("fp32", z.device):
        return torch.cat([model.decoder(part) for part in z.split(batch_size)]).add(1).div(2).contiguous()


@torch.no_grad()
def evaluate(model: Autoencoder, images: Tensor, generator: torch.Generator,
             batch_size: int = 500) -> dict[str, Tensor]:
    """Per-image terms on uint8 images [N, C, H, W], the network in evaluation mode, each [N] (z: [N, z_dim]).

    z: the code (a draw if variational); mse: per pixel on the [-1, 1] scale; if variational also kl: nats, and elbo:
    nats per image, log N(x; decoder(z), sigma^2 I) - KL with the model's sigma, a density over [-1, 1]^pixels.
    """
    model.eval()
    columns: dict[str, list[Tensor]] = {}
    for part in images.split(batch_size):
        x = pixels(part)
        with precision("fp32", x.device):
            z, mean, log_var = model.code(x, generator)
            decoded = model.decoder(z)
        terms = {"z": z, "mse": (decoded - x).square().flatten(1).mean(1)}
        if model.variational:
            terms["kl"] = gaussian_kl(mean, log_var)
            terms["elbo"] = gaussian_log_prob(x, decoded, model.log_sigma) - terms["kl"]
        for name, value in terms.items():
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(parts) for name, parts in columns.items()}


def measure(model: Autoencoder, data: Dataset, generator: torch.Generator, n_train: int = 10_000) -> dict[str, dict]:
    """Every metric of the work's chapter, on the test images; what is fitted sees the first n_train training images.

    mse; best_sigma = sqrt(mean training mse), the sigma with the highest ELBO; if variational kl, elbo (at the model's
    sigma) and elbo_best_sigma; the MMD between codes and N(0, I) with both kernels; `code_statistics`, without
    knn_accuracy for images without labels.
    """
    device = generator.device
    terms = evaluate(model, data.test.to(device), generator)
    best_sigma = evaluate(model, data.train[:n_train].to(device), generator)["mse"].double().mean().sqrt().item()
    metrics = {"mse": estimate(terms["mse"], "squared error per pixel"), "best_sigma": exact(best_sigma, "pixel units")}
    if model.variational:
        at_best = elbo_at(best_sigma, terms["mse"], terms["kl"], data.test[0].numel())
        metrics |= {"kl": estimate(terms["kl"], "nats per image"), "elbo": estimate(terms["elbo"], "nats per image"),
                    "elbo_best_sigma": estimate(at_best, "nats per image"),
                    "sigma": exact(model.log_sigma.exp(), "pixel units")}
    normal = torch.randn(terms["z"].shape, generator=generator, device=device)
    metrics |= {f"mmd_{kind}": mmd_unbiased(terms["z"], normal, kind) for kind in KERNELS}
    mean, train_mean = encode(model, data.test.to(device))[0], encode(model, data.train[:n_train].to(device))[0]
    return metrics | code_statistics(mean, train_mean, data.test_labels, data.train_labels[:n_train])


def code_statistics(mean: Tensor, train_mean: Tensor, labels: Tensor, train_labels: Tensor) -> dict[str, dict]:
    """What the pictures of the latent space show, in numbers, from test codes [n, d] and labelled training ones [m, d].

    code_centre: distance of the mean code from the origin; code_spread: root mean variance per dimension;
    code_radius_99: 99 % of the codes lie within it; knn_accuracy: test labels found by the 10 nearest training codes,
    left out if there are no labels ([0]).
    """
    from sklearn.neighbors import KNeighborsClassifier
    mean, train_mean = mean.cpu(), train_mean.cpu()
    statistics = {"code_centre": exact(mean.mean(0).norm(), "latent units"),
                  "code_spread": exact(mean.var(0).mean().sqrt(), "latent units"),
                  "code_radius_99": exact(mean.norm(dim=1).quantile(0.99), "latent units")}
    if not len(train_labels):
        return statistics
    found = KNeighborsClassifier(10).fit(train_mean.numpy(), train_labels.cpu().numpy()).predict(mean.numpy())
    return statistics | {"knn_accuracy": estimate((torch.from_numpy(found) == labels.cpu()).float(), "fraction")}


def elbo_at(sigma: float, mse: Tensor, kl: Tensor, n_pixels: int) -> Tensor:
    """The ELBO in nats per image had the decoder the given sigma: mse, kl [N] -> [N] (known fault 7).

    -pixels/2 (mse / sigma^2 + log(2 pi sigma^2)) - kl; over sigma it is largest at sigma^2 = mean mse.
    """
    return -0.5 * n_pixels * (mse / sigma ** 2 + math.log(2 * math.pi * sigma ** 2)) - kl
