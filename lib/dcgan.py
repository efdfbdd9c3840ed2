"""A DCGAN as ground truth, an encoder fitted to it, and both trained on together (VAE Approximation Error, CelebA).

Images x in [-1, 1], codes z ~ N(0, I) in R^100. The generator G of a GAN (Radford et al. 2015, as in PyTorch's
tutorial) is taken for the true decoder p*(x|z) = N(G(z), sigma^2 I), sigma = 0.05. Three steps for `train.fit`:
    gan_step      discriminator on real images, on generated ones, generator (Goodfellow et al. 2014, non-saturating)
    encoder_step  maximise log q(z|x) on pairs z ~ N(0, I), x ~ p*(x|z)
    joint_step    maximise the ELBO of x ~ p* in the encoder and in a copy of the decoder
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.autoencoders import pixels
from lib.stochastic import diagonal_log_prob, gaussian_kl, gaussian_log_prob, reparameterise
from lib.train import adam, precision

SIGMA = 0.05                                                  # of p*(x|z), in units of the pixels' [-1, 1]
BETAS = (0.5, 0.999)
LAST_LAYERS = ("normal", "zero")                              # how the encoder's last layer starts (known fault 6)
NORMS = ("running", "batch-1")                                # of images looked at, see `normalised`


class Generator(nn.Module):
    """z [B, nz] -> image mean [B, 3, 64, 64] in [-1, 1]; 3,576,704 parameters at nz = 100, ngf = 64."""

    def __init__(self, nz: int = 100, ngf: int = 64):
        super().__init__()
        self.nz = _checked(nz, "nz")
        widths = [_checked(ngf, "ngf") * m for m in (8, 4, 2, 1)]
        layers = [nn.ConvTranspose2d(nz, widths[0], 4, bias=False)]
        for before, after in pairwise([*widths, 3]):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)]
        self.net = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Image mean [B, 3, 64, 64], float32."""
        return self.net(z[:, :, None, None]).float()


class Trunk(nn.Sequential):
    """x [B, 3, 64, 64] -> features [B, 8 ndf, 4, 4], of the discriminator and of the encoder."""

    def __init__(self, ndf: int = 64):
        widths = [_checked(ndf, "ndf") * m for m in (1, 2, 4, 8)]
        layers = [nn.Conv2d(3, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        super().__init__(*layers)


class Discriminator(nn.Module):
    """x [B, 3, 64, 64] -> logit [B] that x is real; 2,765,568 parameters at ndf = 64."""

    def __init__(self, ndf: int = 64):
        super().__init__()
        self.trunk, self.score = Trunk(ndf), nn.Conv2d(8 * ndf, 1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B], float32: the original's sigmoid is part of the loss here."""
        return self.score(self.trunk(x)).flatten().float()


class Encoder(nn.Module):
    """x [B, 3, 64, 64] -> mean and log sigma of q(z|x), [B, nz] each; 4,395,976 parameters at nz = 100, ndf = 64."""

    def __init__(self, nz: int = 100, ndf: int = 64):
        super().__init__()
        self.trunk, self.head = Trunk(ndf), nn.Conv2d(8 * ndf, 2 * _checked(nz, "nz"), 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log sigma, [B, nz] each, float32."""
        return self.head(self.trunk(x)).flatten(1).float().chunk(2, 1)


def _checked(n: int, name: str) -> int:
    if n < 1:
        raise ValueError(f"{name} must be at least 1, got {n}")
    return n


def initialise(module: nn.Module, generator: torch.Generator, last_layer: str = "normal") -> nn.Module:
    """Weights N(0, 0.02), norm weights N(1, 0.02), biases 0, drawn from the (CPU) generator; returns the module.

    last_layer: of an Encoder, "normal" as all others (what CODE ends up with: known fault 6), or "zero" (what it
    intends), with which q(z|x) starts at N(0, I). Raises ValueError for others.
    """
    if last_layer not in LAST_LAYERS:
        raise ValueError(f"unknown last_layer {last_layer!r}: use one of {', '.join(LAST_LAYERS)}")
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)):
            nn.init.normal_(part.weight, float(isinstance(part, nn.BatchNorm2d)), 0.02, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    if last_layer == "zero" and isinstance(module, Encoder):
        nn.init.zeros_(module.head.weight)
    return module


def frozen(module: nn.Module) -> nn.Module:
    """The module without gradients, in evaluation mode, channels last."""
    return module.requires_grad_(False).eval().to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ the three steps
class Clock(nn.Module):
    """The gradient steps done, as a tensor that checkpoints keep and CUDA graphs advance."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


def gan_step(net: Generator, discriminator: Discriminator, generator: torch.Generator, lr: float = 2e-4) -> tuple:
    """(step, state) of the GAN, for `train.fit`: the step takes real images uint8 [B, 3, 64, 64].

    One Adam step of the discriminator on log D(x) + log(1 - D(G(z))), real and generated images normalised apart, then
    one of the generator on log D(G(z)), the same z. Returns loss_d and loss_g (nats per image), and the discriminator's
    mean probabilities that images are real: of real ones d_real, of generated ones before its step d_fake and after it
    d_fake_after. Raises ValueError: lr not positive.
    """
    for part in (net, discriminator):
        part.train().to(memory_format=torch.channels_last)
    net_optimizer, optimizer = adam(net.parameters(), lr, BETAS), adam(discriminator.parameters(), lr, BETAS)
    clock = Clock().to(generator.device)

    def step(batch: Tensor) -> dict[str, Tensor]:
        z = torch.randn(len(batch), net.nz, generator=generator, device=batch.device)
        fake = net(z)
        optimizer.zero_grad()
        real_logit, fake_logit = discriminator(pixels(batch)), discriminator(fake.detach())
        loss_d = F.softplus(-real_logit).mean() + F.softplus(fake_logit).mean()
        loss_d.backward()
        optimizer.step()

        net_optimizer.zero_grad()
        discriminator.requires_grad_(False)                  # its gradients would be thrown away
        logit = discriminator(fake)
        loss_g = F.softplus(-logit).mean()
        loss_g.backward()
        discriminator.requires_grad_(True)
        net_optimizer.step()
        clock.steps += 1
        return {"loss_d": loss_d, "loss_g": loss_g, "d_real": real_logit.sigmoid().mean(),
                "d_fake": fake_logit.sigmoid().mean(), "d_fake_after": logit.sigmoid().mean()}

    return step, {"generator": net, "discriminator": discriminator, "generator_optimizer": net_optimizer,
                  "discriminator_optimizer": optimizer, "clock": clock, "noise": generator}


@torch.no_grad()
def draw(truth: Generator, n: int, generator: torch.Generator, sigma: float = SIGMA) -> tuple[Tensor, Tensor]:
    """n pairs of the ground truth: z ~ N(0, I) [n, nz] and x ~ N(truth(z), sigma^2 I) [n, 3, 64, 64], not clipped."""
    z = torch.randn(n, truth.nz, generator=generator, device=generator.device)
    x = truth(z)
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return z, (x + sigma * noise).contiguous(memory_format=torch.channels_last)


def encoder_step(truth: Generator, encoder: Encoder, generator: torch.Generator, lr: float = 2e-5,
                 sigma: float = SIGMA) -> tuple:
    """(step, state) that fits q(z|x) to the frozen truth; the step takes any tensor of as many rows as to draw.

    loss: -log q(z|x), nats per image; error: mean square of z - mean; sigma: mean of q's standard deviations.
    Raises ValueError: lr not positive.
    """
    frozen(truth)
    encoder.train().to(memory_format=torch.channels_last)
    optimizer, clock = adam(encoder.parameters(), lr, BETAS), Clock().to(generator.device)

    def step(batch: Tensor) -> dict[str, Tensor]:
        z, x = draw(truth, len(batch), generator, sigma)
        optimizer.zero_grad()
        mean, log_sigma = encoder(x)
        loss = -diagonal_log_prob(z, mean, 2 * log_sigma).mean()
        loss.backward()
        optimizer.step()
        clock.steps += 1
        return {"loss": loss, "error": (z - mean).square().mean(), "sigma": log_sigma.exp().mean()}

    return step, {"truth": truth, "encoder": encoder, "optimizer": optimizer, "clock": clock, "noise": generator}


class Running(Clock):
    """Running means at rate 0.999 of the ELBO and of the aggregate posterior's first two moments, E z and E z^2 [nz].

    They start at what they are for q(z|x) = p(z): 0 and 1; the ELBO at its first value.
    """

    def __init__(self, nz: int, rate: float = 0.999):
        super().__init__()
        self.rate = rate
        for name, value in (("elbo", torch.zeros(())), ("first", torch.zeros(nz)), ("second", torch.ones(nz))):
            self.register_buffer(name, value)

    @torch.no_grad()
    def update(self, elbo: Tensor, mean: Tensor, log_sigma: Tensor) -> dict[str, Tensor]:
        """Take in a step's elbo [B], mean and log sigma [B, nz]; returns the values to log.

        elbo_running; moment_1: root mean square of E z over the dimensions (0 if q matches the prior); moment_2: mean
        of E z^2 (then 1).
        """
        value = elbo.mean()
        self.elbo.copy_(torch.where(self.steps == 0, value, self.elbo.lerp(value, 1 - self.rate)))
        self.first.lerp_(mean.mean(0), 1 - self.rate)
        self.second.lerp_((mean.square() + (2 * log_sigma).exp()).mean(0), 1 - self.rate)
        self.steps += 1
        return {"elbo_running": self.elbo.clone(), "moment_1": self.first.square().mean().sqrt(),
                "moment_2": self.second.mean()}


def joint_step(truth: Generator, encoder: Encoder, decoder: Generator, generator: torch.Generator, lr: float = 1e-5,
               sigma: float = SIGMA) -> tuple:
    """(step, state) that trains encoder and decoder on the ELBO of images of the frozen truth, one Adam for both.

    The ELBO has one reparameterised draw of z and the analytic KL. The step takes any tensor of as many rows as to
    draw and returns loss = -elbo, its parts rec (E log p(x|z)) and kl, in nats per image, and what Running tracks.
    Raises ValueError: lr not positive.
    """
    frozen(truth)
    for part in (encoder, decoder):
        part.requires_grad_(True).train().to(memory_format=torch.channels_last)
    optimizer = adam([*encoder.parameters(), *decoder.parameters()], lr, BETAS)
    running = Running(truth.nz).to(generator.device)

    def step(batch: Tensor) -> dict[str, Tensor]:
        _, x = draw(truth, len(batch), generator, sigma)
        optimizer.zero_grad()
        rec, kl, mean, log_sigma = elbo_terms(encoder, decoder, x, generator, sigma)[1:]
        elbo = rec - kl
        loss = -elbo.mean()
        loss.backward()
        optimizer.step()
        return {"loss": loss, "rec": rec.mean(), "kl": kl.mean(), **running.update(elbo, mean, log_sigma)}

    return step, {"truth": truth, "encoder": encoder, "decoder": decoder, "optimizer": optimizer, "clock": running,
                  "noise": generator}


def elbo_terms(encoder: Encoder, decoder: Generator, x: Tensor, generator: torch.Generator,
               sigma: float = SIGMA) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reconstruction [B, 3, 64, 64], log p(x|z) and KL(q(z|x) || N(0, I)) [B] in nats, mean and log sigma [B, nz].

    One draw z ~ q(z|x); the ELBO is the second less the third (Kingma & Welling 2013, equation 10).
    """
    mean, log_sigma = encoder(x)
    decoded = decoder(reparameterise(mean, 2 * log_sigma, generator))
    return decoded, gaussian_log_prob(x, decoded, math.log(sigma)), gaussian_kl(mean, 2 * log_sigma), mean, log_sigma


# ------------------------------------------------------------------------------------------------ looking
@contextmanager
def normalised(norm: str, *modules: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, their batch norm by its running statistics, or as CODE leaves it for its pictures.

    "batch-1": training mode at batch size 1 (known fault 5), each image normalised by its own mean and variance over
    the places of a feature map, here for any batch at once: instance norm. Raises ValueError for others.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: use one of {', '.join(NORMS)}")
    modes = [(module, module.training) for module in modules]
    hooks = [part.register_forward_hook(_by_instance) for module in modules for part in module.modules()
             if norm == "batch-1" and isinstance(part, nn.BatchNorm2d)]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.train(training)


def _by_instance(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _) -> Tensor:
    return F.instance_norm(inputs[0], weight=norm.weight, bias=norm.bias, eps=norm.eps)


@torch.no_grad()
def generate(net: Generator, z: Tensor, norm: str = "running", numerics: str = "fp32",
             batch_size: int = 250) -> Tensor:
    """z [N, nz] -> image means [N, 3, 64, 64] in [-1, 1]; norm: see `normalised`."""
    with normalised(norm, net), precision(numerics, z.device):
        return torch.cat([net(part).contiguous() for part in z.split(batch_size)])


def to_uint8(x: Tensor, noise: torch.Generator | None = None, sigma: float = SIGMA) -> Tensor:
    """Images [B, 3, 64, 64] in [-1, 1] -> uint8, rounded and clipped; with a generator, N(0, sigma^2) is added first.

    On the GAN's scale, as CODE adds it to the joint model's images (known fault 5).
    """
    if noise is not None:
        x = x + sigma * torch.randn(x.shape, generator=noise, device=x.device)
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
