"""The Gaussian mixture, both stages' step, full batch: the plain loop beside the book's step.

The plain loop takes densities and entropies from torch.distributions (unchecked: checks would wait for the device).
"""
import math

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from lib import gmm, train

SETTINGS = {"batch": 8000, "joint": True, "lr": 1e-4, "seed": 1, "item_every": 1}
CUDA = {}
METRIC = "elbo"
AIMS = []


def data(settings: dict) -> Tensor:
    """The points [batch, 2]: every batch is all of them. Raises ValueError unless they are a multiple of four."""
    if settings["batch"] % gmm.STATES:
        raise ValueError(f"the mixture has four components of equal size, got batch {settings['batch']}")
    return gmm.sample(settings["batch"] // gmm.STATES, seed=settings["seed"]).train


def book(settings: dict, points: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: the encoder by torch.compile."""
    encoder, decoder = gmm.make_encoder(settings["seed"]).to(device), gmm.Decoder().to(device)
    if compiled:
        encoder.compile()
    step, optimizer = gmm.build_step(encoder, decoder, lr=settings["lr"], joint=settings["joint"])
    state = {"decoder": decoder, "encoder": encoder, "optimizer": optimizer}
    return {"step": step, "state": state, "batches": train.Whole(points.to(device)), "config": {}}


class Mixture(nn.Module):
    """p(x, z) of four equal components with the identity covariance, and the encoder of two independent bits."""

    def __init__(self, seed: int):
        super().__init__()
        self.encoder, self.centres = gmm.make_encoder(seed), nn.Parameter(torch.tensor(gmm.CENTRES))
        self.register_buffer("codes", torch.tensor(gmm.CODES, dtype=torch.float32))

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, z) of every z: [n, 4]."""
        components = Independent(Normal(self.centres, 1.0, validate_args=False), 1)
        return components.log_prob(x[:, None]) - math.log(gmm.STATES)

    def q(self, x: Tensor) -> Categorical:
        """q(z|x): the softmax over the codes of score . code."""
        return Categorical(logits=self.encoder(x) @ self.codes.T, validate_args=False)


def plain(settings: dict, points: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on all points, whatever `batches`, and returns the logged metrics."""
    model = Mixture(settings["seed"]).to(device)
    model.centres.requires_grad_(settings["joint"])
    start, x = model.centres.detach().clone(), points.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings["lr"])

    def loop(steps: int) -> list[dict[str, float]]:
        logged = []
        for t in range(1, steps + 1):
            log_joint, q = model.log_joint(x), model.q(x)
            elbo = ((q.probs * log_joint).sum(1) + q.entropy()).mean()
            metrics = {"elbo": elbo, "evidence": log_joint.logsumexp(1).mean(),
                       "drift": (model.centres - start).norm(dim=1).mean()}
            optimizer.zero_grad()
            (-elbo).backward()
            optimizer.step()
            if t % settings["item_every"] == 0:
                logged.append({name: value.item() for name, value in metrics.items()})
        return logged

    return loop, model
