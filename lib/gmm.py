"""A Gaussian mixture as a VAE whose ELBO is exact (VAE Approximation Error, the first experiment).

    python -m lib run gmm --preset paper        # ELBO about -3.37 after stage 1, about -3.31 after stage 2

The latent z has four states; state k is the 2-bit code of k. p(z) = 1/4, p(x|z) = N(x; mu_z, covariance * I).
The encoder gives one score per bit, so q(z|x) factorises over the bits. log p(z|x) does not: it also holds
the product of the two bits, with a weight that changes with x along mu_0 - mu_1 - mu_2 + mu_3. Training both
moves the centres so that this vector shrinks, and away from the truth: the approximation error.

Every expectation over z is a sum of four terms, nothing is sampled: all values are exact, in nats per point.
Source: Shekhovtsov, Schlesinger, Flach, "VAE Approximation Error: ELBO and Exponential Families", ICLR 2022.
"""
import copy
import hashlib
import math

import numpy as np
import torch
from torch import Tensor, nn

from lib.data import Dataset
from lib.evaluate import estimate, exact
from lib.train import adam

CENTRES = ((1.0, 1.0), (1.0, -1.0), (0.0, 0.0), (-1.0, 0.0))
CODES = ((0, 0), (0, 1), (1, 0), (1, 1))                  # CODES[k]: the two bits of state k
STATES = len(CODES)
READINGS = {"code": 1.0, "text_variance": 0.01, "text_deviation": 0.01 ** 2}   # covariances (known fault 3)
NATS = "nats per point"


def check_covariance(covariance: float) -> None:
    """Raise ValueError, in one line, unless `covariance` (the variance per axis) is positive and finite."""
    if not (math.isfinite(covariance) and covariance > 0):
        raise ValueError(f"covariance must be positive and finite, got {covariance}")


# -------------------------------------------------------------------------------------- data and models
def sample(points_per_component: int, covariance: float = 1.0, seed: int = 0) -> Dataset:
    """Draw the data: `points_per_component` points of each component to train on, as many fresh ones to test.

    Points are float32 [4 * points_per_component, 2] in the components' order, labels the component. Raises
    ValueError: covariance not positive, fewer than one point.
    """
    check_covariance(covariance)
    if points_per_component < 1:
        raise ValueError(f"points_per_component must be at least 1, got {points_per_component}")
    z = torch.arange(STATES).repeat_interleave(points_per_component)
    noise = torch.randn(2, len(z), 2, generator=torch.Generator().manual_seed(seed))
    train, test = torch.tensor(CENTRES)[z] + math.sqrt(covariance) * noise
    digest = hashlib.sha256(torch.stack([train, test]).numpy().tobytes()).hexdigest()
    return Dataset("mixture", train, test, z, z, tuple(f"{a}{b}" for a, b in CODES), digest)


class Decoder(nn.Module):
    """p(x, z): the four centres mu_z are its only parameters (8 numbers); prior and covariance are known."""

    def __init__(self, covariance: float = 1.0, centres=CENTRES):
        """Start at `centres` [4, 2]. Raises ValueError: covariance not positive."""
        super().__init__()
        check_covariance(covariance)
        self.covariance = covariance
        self.centres = nn.Parameter(torch.tensor(centres))
        self.register_buffer("start", torch.tensor(centres), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """log p(x, z) of every z: [n, 2] -> [n, 4]."""
        return log_joint(x, self.centres, self.covariance)

    def drift(self) -> Tensor:
        """Distance of each centre from where it started: [4]."""
        return (self.centres - self.start).norm(dim=1)

    def interaction(self) -> Tensor:
        """|mu_0 - mu_1 - mu_2 + mu_3|, 0-d: the term of log p(z|x) that no factorised encoder can express."""
        return (self.centres[0] - self.centres[1] - self.centres[2] + self.centres[3]).norm()


def make_encoder(seed: int, hidden: int = 64) -> nn.Sequential:
    """The ReLU network 2-64-64-2 (4,482 parameters): points [n, 2] -> one score per bit [n, 2].

    Initial weights are PyTorch's defaults, drawn from `seed`; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                             nn.Linear(hidden, 2))


# -------------------------------------------------------------------------------------- exact quantities
def log_joint(x: Tensor, centres: Tensor, covariance: float) -> Tensor:
    """log p(x, z) = log 1/4 + log N(x; mu_z, covariance * I): [n, 2], [4, 2] -> [n, 4]."""
    first, second = x[:, :1] - centres[:, 0], x[:, 1:] - centres[:, 1]    # expanded, these cancel badly
    log_normal = -(first * first + second * second) / (2 * covariance) - math.log(2 * math.pi * covariance)
    return log_normal - math.log(STATES)


def log_evidence(log_pxz: Tensor) -> Tensor:
    """log p(x): [n, 4] -> [n]."""
    return log_pxz.logsumexp(1)


def log_posterior(log_pxz: Tensor) -> Tensor:
    """log p(z|x), by Bayes: [n, 4] -> [n, 4]."""
    return log_pxz.log_softmax(1)


def log_q(scores: Tensor) -> Tensor:
    """log q(z|x), the softmax over the codes of score . code, so two independent bits: [n, 2] -> [n, 4]."""
    first, second = scores.unbind(1)
    return torch.stack([torch.zeros_like(first), second, first, first + second], 1).log_softmax(1)


def elbo(log_qz: Tensor, log_pxz: Tensor) -> Tensor:
    """E_q[log p(x, z) - log q(z|x)]: [n, 4], [n, 4] -> [n]."""
    return (log_qz.exp() * (log_pxz - log_qz)).sum(1)


def kl(log_qz: Tensor, log_pz: Tensor) -> Tensor:
    """KL(q || p) of two distributions over the states: [n, 4], [n, 4] -> [n]."""
    return (log_qz.exp() * (log_qz - log_pz)).sum(1)


def best_factorised_elbo(log_pxz: Tensor, iterations: int = 100) -> Tensor:
    """The ELBO of the best q of two independent bits, point by point: [n, 4] -> [n].

    No encoder of this family can exceed it, however large its network. Mean-field coordinate ascent (the
    score of one bit given the other's probability), from near each of the four states, keeping the best.
    """
    l00, l01, l10, l11 = log_pxz.unbind(1)
    best = torch.full_like(l00, -torch.inf)
    for first, second in CODES:
        scores = [torch.full_like(l00, 6.0 * bit - 3.0) for bit in (first, second)]
        for _ in range(iterations):
            other = scores[1].sigmoid()
            scores[0] = (1 - other) * (l10 - l00) + other * (l11 - l01)
            other = scores[0].sigmoid()
            scores[1] = (1 - other) * (l01 - l00) + other * (l11 - l10)
        best = torch.maximum(best, elbo(log_q(torch.stack(scores, 1)), log_pxz))
    return best


def expected_log_evidence(covariance: float, nodes: int = 100) -> float:
    """E[log p(x)] when x comes from the mixture itself, nats, by quadrature in float64.

    What the mean log evidence of ever more data tends to, and so an upper limit of every expected ELBO. 100
    nodes per axis are exact to 1e-7 nats for covariances in [1e-4, 4]. Raises ValueError: covariance not
    positive.
    """
    return _expectation(log_evidence, covariance, nodes)


def expected_gap(covariance: float, nodes: int = 40) -> float:
    """E[KL(q || p(z|x))] of the best factorised q under the true mixture, nats: what stage 1 cannot get below.

    By quadrature, good to 1e-5 nats. Raises ValueError: covariance not positive.
    """
    return _expectation(lambda log_pxz: log_evidence(log_pxz) - best_factorised_elbo(log_pxz), covariance, nodes)


def _expectation(function, covariance: float, nodes: int) -> float:
    """E[function(log p(x, z))] over the mixture: Gauss-Hermite about each centre; function: [n, 4] -> [n]."""
    check_covariance(covariance)
    t, weights = np.polynomial.hermite_e.hermegauss(nodes)
    t, weights = math.sqrt(covariance) * torch.from_numpy(t), torch.from_numpy(weights / weights.sum())
    centres = torch.tensor(CENTRES, dtype=torch.float64)
    x = centres[:, None] + torch.cartesian_prod(t, t)                            # [4, nodes^2, 2]
    values = function(log_joint(x.flatten(0, 1), centres, covariance)).reshape(STATES, -1)
    return (values @ torch.outer(weights, weights).flatten()).mean().item()


# -------------------------------------------------------------------------------------- training
def build_step(encoder: nn.Module, decoder: Decoder, *, lr: float, joint: bool):
    """One stage: (step, optimizer); `step(x)` goes one Adam step up the mean ELBO of the points x [n, 2].

    Stage 1 (joint=False) trains the encoder against the decoder as it is; stage 2 (joint=True) trains the
    encoder and the centres. The step returns, as of before its update, the ELBO and log evidence (nats per
    point) and the mean drift of the centres. Sets `requires_grad` of the decoder.
    """
    decoder.requires_grad_(joint)
    parameters = [*encoder.parameters(), *(decoder.parameters() if joint else ())]
    optimizer = adam(parameters, lr)

    def step(x: Tensor) -> dict[str, Tensor]:
        log_pxz = decoder(x)
        bound = elbo(log_q(encoder(x)), log_pxz).mean()
        with torch.no_grad():
            metrics = {"elbo": bound.detach(), "evidence": log_evidence(log_pxz).mean(),
                       "drift": decoder.drift().mean()}
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        return metrics

    return step, optimizer


def joined(first: dict, second: dict) -> dict:
    """The histories of the two stages as one: the steps of the second are counted on."""
    done = first["step"][-1] if first["step"] else 0
    second = second | {"step": [done + step for step in second["step"]]}
    return {name: first.get(name, []) + second.get(name, []) for name in first | second}


@torch.no_grad()
def diagnose(x: Tensor, encoder: nn.Module, decoder: Decoder) -> dict[str, Tensor]:
    """What is known of each point x [n, 2], computed in float64: name -> [n], nats.

    elbo; evidence (of the current decoder); gap = KL(q || posterior of the current decoder);
    kl = KL(q || posterior of the decoder as it started, the ground truth);
    elbo_best = the ELBO of the best factorised q for the current decoder.
    """
    x, encoder, decoder = x.double(), copy.deepcopy(encoder).double(), copy.deepcopy(decoder).double()
    log_qz, log_pxz = log_q(encoder(x)), decoder(x)
    truth = log_joint(x, decoder.start, decoder.covariance)
    return {
        "elbo": elbo(log_qz, log_pxz),
        "evidence": log_evidence(log_pxz),
        "gap": kl(log_qz, log_posterior(log_pxz)),
        "kl": kl(log_qz, log_posterior(truth)),
        "elbo_best": best_factorised_elbo(log_pxz),
    }


def measure(dataset: Dataset, encoder_only: tuple, joint: tuple) -> dict[str, dict]:
    """Every metric of a run, from (encoder, decoder) after stage 1 and after stage 2; errors over points.

    <diagnosis>_<stage> on the training points (see `diagnose`), elbo_test_<stage> on fresh ones; elbo_gain,
    kl_rise: stage 2 minus stage 1, paired by point; drift_<code>, drift_mean: distances of the centres from
    the truth; interaction_<stage>; expected_evidence_<reading>, expected_gap_<reading>: for each of READINGS.
    """
    metrics, found = {}, {}
    for stage, (encoder, decoder) in {"encoder_only": encoder_only, "joint": joint}.items():
        where = decoder.centres.device
        found[stage] = diagnose(dataset.train.to(where), encoder, decoder)
        metrics |= {f"{name}_{stage}": estimate(values, NATS) for name, values in found[stage].items()}
        fresh = diagnose(dataset.test.to(where), encoder, decoder)
        metrics[f"elbo_test_{stage}"] = estimate(fresh["elbo"], NATS)
        metrics[f"interaction_{stage}"] = exact(decoder.interaction().item(), "distance")
    metrics["elbo_gain"] = estimate(found["joint"]["elbo"] - found["encoder_only"]["elbo"], NATS)
    metrics["kl_rise"] = estimate(found["joint"]["kl"] - found["encoder_only"]["kl"], NATS)
    drift = joint[1].drift().tolist()
    for name, moved in zip((*dataset.label_names, "mean"), (*drift, sum(drift) / STATES), strict=True):
        metrics[f"drift_{name}"] = exact(moved, "distance")
    for reading, covariance in READINGS.items():
        metrics[f"expected_evidence_{reading}"] = exact(expected_log_evidence(covariance), NATS)
        metrics[f"expected_gap_{reading}"] = exact(expected_gap(covariance), NATS)
    return metrics


def axis_of(x: Tensor, side: int = 301) -> Tensor:
    """`side` coordinates, symmetric about 0, that hold 99.5 % of those of the points x [n, 2]."""
    reach = x.abs().flatten().sort().values[int(0.995 * (x.numel() - 1))].item()
    return torch.linspace(-reach, reach, side, device=x.device)


@torch.no_grad()
def preferred(x: Tensor, decoder: Decoder, *encoders: nn.Module) -> Tensor:
    """The most probable state of each x [n, 2] by the ground truth, then by each encoder's q: [1 + k, n]."""
    truth = log_joint(x, decoder.start, decoder.covariance)
    return torch.stack([truth.argmax(1), *(log_q(encoder(x)).argmax(1) for encoder in encoders)])
