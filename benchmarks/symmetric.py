"""Symmetric learning of the binary HVAE with the ladder encoder: the plain loop beside the book's step.

The plain loop follows the work's code: x and z of the p-step and of the q-step, the running statistics and the chain of
ten images each by passes of their own. Modules of torch.nn, contiguous tensors, two Adams as PyTorch makes them.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import looped
from lib import data as datasets
from lib import symmetric

SETTINGS = {"batch": 128, "width": 32, "z0_bits": 30, "z1_bits": 100, "lr": 1e-4, "dataset": "mnist", "seed": 1,
            "item_every": 1}
CUDA = {"batch": 1024}
METRIC = "loss"
AIMS = [{"device": "cpu", "settings": {"batch": 128, "width": 32}, "ratio": 1.6},
        {"device": "cuda", "settings": {"batch": 1024, "width": 32}, "ratio": 5.0, "share": 0.4}]
CHAIN = 10


def data(settings: dict) -> Tensor:
    """All images, uint8 [N, 1, 28, 28]. Raises DataError if the data set is not there, ValueError if it is grey."""
    if settings["dataset"] in symmetric.GAUSSIAN:
        raise ValueError(f"the plain loop is written for binarised images, not for {settings['dataset']!r}")
    return symmetric.split(datasets.load(settings["dataset"], size=28), held_out=False)[0]


def book(settings: dict, images: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: the image networks by torch.compile."""
    parameters = {"dataset": settings["dataset"], "encoder": "ladder", "learning": "symmetric", "held_out": False,
                  "batch_size": settings["batch"], "precision": precision, "compiled": compiled}
    return symmetric.replica(settings | parameters, images, device)


# ------------------------------------------------------------------------------------------------ the plain loop
class Logits(nn.Module):
    """n_in inputs -> logits of n_out bits: two tanh layers 600 wide, and a linear skip."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_in, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, n_out))
        self.skip = nn.Linear(n_in, n_out, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Logits [B, n_out]."""
        return self.net(z) + self.skip(z)


class Ladder(nn.Module):
    """p(z1|z0), p(x|z1), and the ladder encoder q(z0|x) q(z1|z0, x)."""

    def __init__(self, n0: int, n1: int, w: int, features: int = 600):
        super().__init__()
        self.prior = Logits(n0, n1)
        up = [(n1, 4 * w, 4, 1), (4 * w, 2 * w, 3, 2), (2 * w, 2 * w, 3, 1), (2 * w, 2 * w, 3, 1), (2 * w, w, 3, 2),
              (w, w, 2, 1)]
        layers = [part for layer in up for part in (nn.ConvTranspose2d(*layer), nn.Tanh())]
        self.decoder = nn.Sequential(nn.Unflatten(1, (n1, 1, 1)), *layers, nn.Conv2d(w, 1, 3, 1, 1))
        down = [(1, w, 3, 1, 1), (w, w, 2), (w, 2 * w, 3, 2), (2 * w, 2 * w, 3), (2 * w, 2 * w, 3),
                (2 * w, 4 * w, 3, 2), (4 * w, features, 4)]
        layers = [part for layer in down for part in (nn.Conv2d(*layer), nn.Tanh())]
        self.trunk, self.to_z1 = nn.Sequential(*layers, nn.Flatten()), nn.Linear(features, n1)
        heads = [part for a, b in pairwise([features] * 3) for part in (nn.Linear(a, b), nn.Tanh())]
        self.to_z0, self.skip = nn.Sequential(*heads, nn.Linear(features, n0)), nn.Linear(n1, n0, bias=False)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of q(z0|x), and what x adds to those of p(z1|z0)."""
        h = self.trunk(x)
        added = self.to_z1(h)
        return self.to_z0(h) + self.skip(added), added

    def sample_q(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z0, z1 ~ q(.|x) and their logits."""
        logits0, added = self.encode(x)
        z0 = logits0.sigmoid().bernoulli()
        logits1 = self.prior(z0) + added
        return z0, logits1.sigmoid().bernoulli(), logits0, logits1

    def sample_p(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """z0, z1 ~ p and the logits of z1."""
        z0 = torch.full((n, self.prior.skip.in_features), 0.5, device=self.to_z1.weight.device).bernoulli()
        logits = self.prior(z0)
        return z0, logits.sigmoid().bernoulli(), logits

    def sample_x(self, z1: Tensor) -> Tensor:
        """x ~ p(.|z1)."""
        return self.decoder(z1).sigmoid().bernoulli()


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over the batch of the sums over units."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)


class Information:
    """Running mean probability of each bit, and the mutual information in bits that it has with its condition."""

    def __init__(self, n: int, device: torch.device):
        self.mean, self.mi = torch.full((n,), 0.5, device=device), torch.zeros(n, device=device)

    def update(self, logits: Tensor) -> Tensor:
        """Take in a batch of logits [B, n]; the mean over bits of the running information."""
        p = logits.sigmoid()
        self.mean = 0.99 * self.mean + 0.01 * p.mean(0)
        self.mi = 0.99 * self.mi + 0.01 * (entropy(self.mean) - entropy(p).mean(0)) / math.log(2)
        return self.mi.mean()


def entropy(p: Tensor) -> Tensor:
    """Entropy of bits with probability p, in nats."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def plain(settings: dict, images: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` and returns the logged metrics, {name: number} each."""
    torch.manual_seed(settings["seed"])
    n0, n1 = settings["z0_bits"], settings["z1_bits"]
    model = Ladder(n0, n1, settings["width"]).to(device)
    generative = [*model.prior.parameters(), *model.decoder.parameters()]
    encoder = [p for part in (model.trunk, model.to_z1, model.to_z0, model.skip) for p in part.parameters()]
    p_adam, q_adam = (torch.optim.Adam(own, lr=settings["lr"]) for own in (generative, encoder))
    kept = {"mi_q_z0": Information(n0, device), "mi_q_z1": Information(n1, device), "mi_p_z1": Information(n1, device)}
    chain = torch.rand(CHAIN, 1, 28, 28, device=device).round()

    def step(batch: Tensor) -> dict[str, Tensor]:
        nonlocal chain
        x = (batch.float() / 255 > symmetric.THRESHOLD).float()
        x = (x - torch.full_like(x, symmetric.FLIPPED).bernoulli()).abs()
        with torch.no_grad():
            z0, z1, *_ = model.sample_q(x)
        p_adam.zero_grad()
        p_z1, p_x = bce(model.prior(z0), z1), bce(model.decoder(z1), x)
        (p_z1 + p_x).backward()
        p_adam.step()

        with torch.no_grad():
            z0, z1, prior = model.sample_p(len(x))
            drawn = model.sample_x(z1)
        q_adam.zero_grad()
        logits0, added = model.encode(drawn)
        q_z0, q_z1 = bce(logits0, z0), bce(prior + added, z1)
        (q_z0 + q_z1).backward()
        q_adam.step()

        with torch.no_grad():
            *_, logits0, logits1 = model.sample_q(x)
            seen = {"mi_q_z0": logits0, "mi_q_z1": logits1, "mi_p_z1": model.sample_p(len(x))[2]}
            information = {name: kept[name].update(logits) for name, logits in seen.items()}
            chain = model.sample_x(model.sample_q(chain)[1])
        return {"loss": p_z1 + p_x, "p_x": p_x / x[0].numel(), "p_z1": p_z1 / n1, "q_z0": q_z0 / n0,
                "q_z1": q_z1 / n1} | information

    return looped(step, batches, settings["item_every"]), model
