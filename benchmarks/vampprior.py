"""VAE and HVAE under a VampPrior: the plain loop beside the book's step.

    python -m benchmarks vampprior                                                            # the paper's HVAE
    python -m benchmarks vampprior --set net=port --set model=vae --batch 256 --set lr=1e-4   # the port's VAE

The plain loop follows the paper's code: a gate is two linear layers, the mixture's densities are a [B, K, d] tensor in
float32, gradients are normalised and weights updated tensor by tensor, pixel probabilities are clamped. That code has
its pseudo-inputs from a linear layer that it feeds the identity; here they are a parameter, in the plain loop's favour.
What a training evaluates after every epoch (`look`) is no part of either.
"""
import math
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import looped
from lib import binarised, vamplikelihood, vampport
from lib import data as datasets

SETTINGS = {"batch": 100, "net": "gated", "model": "hvae", "prior": "vamp", "components": 500, "lr": 5e-4,
            "dataset": "mnist", "seed": 1, "item_every": 1}
CUDA = {"batch": 1000}
METRIC = "loss"
AIMS = []
NETS = {"gated": {"latent_dim": 40, "hidden": 300, "pseudo_init": "noise", "warmup": 100, "patience": 50,
                  "normalised": True, "binarisation": "dynamic"},
        "port": {"latent_dim": 2, "network_size": 4, "activation": "relu", "pseudo_init": "images", "warmup": 0,
                 "normalised": False}}
KNOWN = {"net": tuple(NETS), "model": ("vae", "hvae"), "prior": ("standard", "vamp"), "dataset": binarised.GREY}


def data(settings: dict) -> Tensor:
    """The training images, grey, uint8 [N, 1, 28, 28].

    Raises DataError if the data set is not there, ValueError: a net, model, prior or data set not of KNOWN.
    """
    for name, known in KNOWN.items():
        if settings[name] not in known:
            raise ValueError(f"the plain loop is written for {name} {' or '.join(known)}, not for {settings[name]!r}")
    if settings["net"] == "port":
        return datasets.load(settings["dataset"], size=28).train
    return binarised.load(settings["dataset"], "dynamic").train


def book(settings: dict, images: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: all networks by torch.compile.

    Raises ValueError: components < 1, lr not positive.
    """
    parameters = settings | NETS[settings["net"]] | {"batch_size": settings["batch"], "precision": precision}
    own = SimpleNamespace(train=images, valid=images[:1], test=images[:1])
    job = (vampport if settings["net"] == "port" else vamplikelihood).replica(parameters, own, device)
    model = job["state"]["model"]
    if compiled:
        for net in (model.encoder, model.decoder, *(model.lower.children() if model.lower else ())):
            net.compile()
    return {name: job[name] for name in ("step", "batches", "state", "config")}


# ------------------------------------------------------------------------------------------------ the plain loop
class Gate(nn.Linear):
    """h(x) * sigmoid(g(x)), two linear layers: [B, n] -> [B, width].

    What is trained, `layers`, lies in the memory of the one matrix that the book has, so that its weights can be given.
    """

    def __init__(self, n: int, width: int):
        super().__init__(n, 2 * width)
        halves = zip(self.weight.detach().chunk(2), self.bias.detach().chunk(2), strict=True)
        self.layers = [tuple(map(nn.Parameter, half)) for half in halves]

    def forward(self, x: Tensor) -> Tensor:
        """[B, width]."""
        h, g = (F.linear(x, *layer) for layer in self.layers)
        return h * torch.sigmoid(g)


class Heads(nn.Module):
    """h [B, width] -> mean and log variance, [B, d] each."""

    def __init__(self, width: int, d: int):
        super().__init__()
        self.mean, self.log_var = nn.Linear(width, d), nn.Sequential(nn.Linear(width, d), nn.Hardtanh(-6.0, 2.0))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, [B, d] each."""
        return self.mean(h), self.log_var(h)


def gated(layers: int, d: int, hidden: int) -> dict[str, nn.Module]:
    """The paper's networks, d dimensions in each of one (VAE) or two layers."""
    nets = {"q_z2": nn.Sequential(nn.Flatten(), Gate(784, hidden), Gate(hidden, hidden), Heads(hidden, d))}
    nets |= {f"x_from_z{2 - i}": Gate(d, hidden) for i in range(layers)}
    nets["p_x"] = nn.Sequential(Gate(layers * hidden, hidden), nn.Linear(hidden, 784), nn.Sigmoid(),
                                nn.Unflatten(1, (1, 28, 28)))
    if layers == 2:
        nets |= {"z1_from_x": nn.Sequential(nn.Flatten(), Gate(784, hidden)), "z1_from_z2": Gate(d, hidden),
                 "q_z1": nn.Sequential(Gate(2 * hidden, hidden), Heads(hidden, d)),
                 "p_z1": nn.Sequential(Gate(d, hidden), Gate(hidden, hidden), Heads(hidden, d))}
    return nets


def port(layers: int, d: int, f: int) -> dict[str, nn.Module]:
    """The port's networks, f its network_size, d dimensions in each of one (VAE) or two layers."""
    up = [(32, 32 * f, 1), (32 * f, 16 * f, 2), (16 * f, 16 * f, 1), (16 * f, 8 * f, 2)]
    up = [part for a, b, stride in up for part in (nn.ConvTranspose2d(a, b, 3, stride, 1, stride - 1), nn.ReLU())]
    nets = {"q_z2": nn.Sequential(*image_layers(f), Heads(256, d))}
    nets |= {f"x_from_z{2 - i}": nn.Identity() for i in range(layers)}
    nets["p_x"] = nn.Sequential(nn.Linear(layers * d, 7 * 7 * 32), nn.ReLU(), nn.Unflatten(1, (32, 7, 7)), *up,
                                nn.ConvTranspose2d(8 * f, 1, 3, 1, 1), nn.Sigmoid())
    if layers == 2:
        nets |= {"z1_from_x": nn.Sequential(*image_layers(f)), "z1_from_z2": nn.Sequential(*dense(d, 256, 256)),
                 "q_z1": nn.Sequential(*dense(512, 256), Heads(256, d)),
                 "p_z1": nn.Sequential(*dense(d, 300, 300), Heads(300, d))}
    return nets


def image_layers(f: int) -> list[nn.Module]:
    """[B, 1, 28, 28] -> [B, 256]."""
    down = [(1, 8 * f, 7, 1), (8 * f, 16 * f, 3, 2), (16 * f, 16 * f, 5, 1), (16 * f, 32 * f, 3, 2)]
    down = [part for a, b, size, stride in down for part in (nn.Conv2d(a, b, size, stride, size // 2), nn.ReLU())]
    return [*down, nn.Flatten(), *dense(7 * 7 * 32 * f, 256)]


def dense(*widths: int) -> list[nn.Module]:
    """Linear layers of these widths, each with its ReLU."""
    return [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]


class Model(nn.Module):
    """p(x|z2, z1), p(z1|z2), q(z2|x), q(z1|x, z2) and the prior of z2; in a VAE there is no z1."""

    def __init__(self, net: str, model: str, prior: str, components: int):
        super().__init__()
        own, layers, self.gated = NETS[net], 1 if model == "vae" else 2, net == "gated"
        self.u = nn.Parameter(torch.rand(components, 1, 28, 28)) if prior == "vamp" else None
        self.nets = nn.ModuleDict(gated(layers, own["latent_dim"], own["hidden"]) if self.gated else
                                  port(layers, own["latent_dim"] // layers, own["network_size"]))

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z2) + d/2 log 2 pi, nats [B]; the components are computed anew."""
        if self.u is None:
            return -0.5 * z.pow(2).sum(1)
        mean, log_var = self.nets["q_z2"]((self.u if self.gated else 0.2 * self.u + 0.5).clamp(0, 1))
        each = log_normal(z[:, None], mean[None], log_var[None]) - math.log(len(mean))
        largest = each.max(1).values
        return largest + (each - largest[:, None]).exp().sum(1).log()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x|z) and log q(z|x) - log p(z), nats [B] each, at one draw."""
        nets = self.nets
        q = nets["q_z2"](x)
        z2 = drawn(*q)
        kl, codes = log_normal(z2, *q) - self.log_prior(z2), [nets["x_from_z2"](z2)]
        if "q_z1" in nets:
            q = nets["q_z1"](torch.cat([nets["z1_from_x"](x), nets["z1_from_z2"](z2)], 1))
            z1 = drawn(*q)
            kl = kl + log_normal(z1, *q) - log_normal(z1, *nets["p_z1"](z2))
            codes.append(nets["x_from_z1"](z1))
        p = nets["p_x"](torch.cat(codes, 1)).clamp(1e-5, 1 - 1e-5)
        return (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1), kl


def drawn(mean: Tensor, log_var: Tensor) -> Tensor:
    """z ~ N(mean, exp(log_var)), [B, d]."""
    return mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)


def log_normal(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mean, exp(log_var)) + d/2 log 2 pi, nats: the sum over the last dimension."""
    return -0.5 * (log_var + (z - mean).pow(2) / log_var.exp()).sum(-1)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The tensors that the optimizer changes: of a gate, those of its two layers."""
    return [weight for part in model.modules() for weight in
            (sum(part.layers, ()) if isinstance(part, Gate) else part.parameters(recurse=False))]


def plain(settings: dict, images: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` and returns the logged metrics, {name: number} each."""
    torch.manual_seed(settings["seed"])
    with device:                                                    # moved there, a gate's layers would be copies
        model = Model(*(settings[name] for name in ("net", "model", "prior", "components")))
    weights, own = trained(model), NETS[settings["net"]]
    optimizer = torch.optim.Adam(weights, lr=settings["lr"], foreach=False)
    done, per_epoch = 0, len(images) // settings["batch"]

    def step(batch: Tensor) -> dict[str, Tensor]:
        nonlocal done
        x = batch.float() / 255
        x = torch.bernoulli(x) if model.gated else x
        beta = min(1.0, (done // per_epoch + 1) / own["warmup"]) if own["warmup"] else 1.0
        optimizer.zero_grad()
        rec, kl = model(x)
        loss = (beta * kl - rec).mean()
        loss.backward()
        if own["normalised"]:
            for weight in weights:
                weight.grad /= weight.grad.norm() + 1e-7
        optimizer.step()
        done += 1
        return {"loss": loss, "rec": -rec.mean(), "kl": kl.mean()}

    return looped(step, batches, settings["item_every"]), model
