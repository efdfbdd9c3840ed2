"""An encoder and its decoder on images of a GAN, or the encoder alone: the plain loop beside the book's step.

    python -m benchmarks celeba-joint
    python -m benchmarks celeba-joint --set stage=encoder
Images are drawn from the frozen generator, so neither loop loads any. Its weights are those that a training of the GAN
starts with: the time of a step does not depend on them.
"""
import copy
import itertools
import math

import torch
from torch import Tensor, nn

from benchmarks import celeba_gan
from benchmarks.harness import looped
from lib import dcgan, train

SETTINGS = {"batch": 32, "stage": "joint", "nz": 100, "ngf": 64, "ndf": 64, "lr": 1e-5, "seed": 1, "item_every": 1}
CUDA = {"batch": 128}
METRIC = "loss"
SIZE = {name: (SETTINGS | CUDA)[name] for name in ("batch", "stage", "nz", "ngf", "ndf")}
AIMS = [{"device": "cuda", "settings": SIZE, "rate": 1e6 / (25 * 60)}]      # a training in less than 25 minutes
STAGES = ("encoder", "joint")


def data(settings: dict) -> Tensor:
    """As many rows as images to draw, with nothing in them: [batch, 0]. Raises ValueError: a stage not of STAGES."""
    if settings["stage"] not in STAGES:
        raise ValueError(f"the stage must be {' or '.join(STAGES)}, got {settings['stage']!r}")
    return torch.empty(settings["batch"], 0)


def book(settings: dict, rows: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: all networks by torch.compile.

    Raises ValueError: sizes < 1, lr not positive.
    """
    weights = train.generator(settings["seed"], use="weights")
    truth = dcgan.initialise(dcgan.Generator(settings["nz"], settings["ngf"]), weights)
    nets = [truth, dcgan.initialise(dcgan.Encoder(settings["nz"], settings["ndf"]), weights)]
    if settings["stage"] == "joint":
        nets.append(copy.deepcopy(truth))
    make = dcgan.joint_step if settings["stage"] == "joint" else dcgan.encoder_step
    step, state = make(*(net.to(device) for net in nets), train.generator(settings["seed"], device), settings["lr"])
    if compiled:
        for net in nets:
            net.compile()
    return {"step": step, "state": state, "batches": train.Whole(rows.to(device)), "config": {}}


# ------------------------------------------------------------------------------------------------ the plain loop
def feeds(settings: dict, device: torch.device) -> dict:
    """What the plain loop is fed by: the rows, again and again."""
    return {"images that it draws": lambda rows, size: itertools.repeat(rows)}


def log_normal(x: Tensor, mean: Tensor, log_sigma: Tensor | float) -> Tensor:
    """log N(x; mean, sigma^2), nats [B], summed over all dimensions but the first."""
    squares = (x - mean) ** 2 / (2 * torch.as_tensor(2 * log_sigma).exp())
    return -(squares + log_sigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class Tracked:
    """Running means at rate 0.999: of the ELBO, and of E z and E z^2 of the aggregate posterior."""

    def __init__(self, nz: int, device: torch.device):
        self.elbo, self.first, self.second = None, torch.zeros(nz, device=device), torch.ones(nz, device=device)

    @torch.no_grad()
    def update(self, elbo: Tensor, mean: Tensor, log_sigma: Tensor) -> dict[str, Tensor]:
        """Take in a step's values; returns those to log."""
        self.elbo = elbo.detach() if self.elbo is None else 0.999 * self.elbo + 0.001 * elbo
        self.first = 0.999 * self.first + 0.001 * mean.mean(0)
        self.second = 0.999 * self.second + 0.001 * (mean ** 2 + (2 * log_sigma).exp()).mean(0)
        return {"elbo_running": self.elbo, "moment_1": (self.first ** 2).mean().sqrt(), "moment_2": self.second.mean()}


def plain(settings: dict, rows: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` and returns the logged metrics, {name: number} each."""
    torch.manual_seed(settings["seed"])
    nz, joint = settings["nz"], settings["stage"] == "joint"
    truth = celeba_gan.generator(nz, settings["ngf"]).to(device).eval().requires_grad_(False)
    head = nn.Conv2d(8 * settings["ndf"], 2 * nz, 4)
    encoder = nn.Sequential(*celeba_gan.trunk(settings["ndf"]), head, nn.Flatten()).to(device)
    trained = [encoder, celeba_gan.generator(nz, settings["ngf"]).to(device)] if joint else [encoder]
    weights = [weight for net in trained for weight in net.parameters()]
    optimizer = torch.optim.Adam(weights, lr=settings["lr"], betas=(0.5, 0.999))
    tracked = Tracked(nz, device)

    def losses(z: Tensor, x: Tensor) -> dict[str, Tensor]:
        mean, log_sigma = encoder(x).chunk(2, 1)
        if not joint:
            loss = -log_normal(z.flatten(1), mean, log_sigma).mean()
            return {"loss": loss, "error": ((z.flatten(1) - mean) ** 2).mean(), "sigma": log_sigma.exp().mean()}
        z = mean + log_sigma.exp() * torch.randn_like(mean)
        rec = log_normal(x, trained[1](z[:, :, None, None]), math.log(dcgan.SIGMA)).mean()
        kl = 0.5 * (mean ** 2 + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(1).mean()
        return {"loss": kl - rec, "rec": rec, "kl": kl, **tracked.update(rec - kl, mean, log_sigma)}

    def step(batch: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            z = torch.randn(len(batch), nz, 1, 1, device=device)
            x = truth(z)
            x = x + dcgan.SIGMA * torch.randn_like(x)
        metrics = losses(z, x)
        optimizer.zero_grad()
        metrics["loss"].backward()
        optimizer.step()
        return metrics

    return looped(step, batches, settings["item_every"]), nn.ModuleList([truth, *trained])
