"""Is a larger beta less entangled? beta-VAEs on scenes whose factors are known, trained and scored at several seeds.

The loss is the work's, mse / sigma^2 + 2 log sigma + beta 2 KL / pixels: pixels / 2 times it is, up to a constant,
pixels mse / (2 sigma^2) + beta KL in nats per image, so that beta sigma^2 alone decides what a code may cost.
"""
import hashlib
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from lib import autoencoders
from lib.autoencoders import MULTIPLIERS, Autoencoder, encode, training
from lib.data import SHAPES, Dataset
from lib.disentanglement import UNKNOWABLE, disentanglement, mig, mutual_information
from lib.evaluate import active_units, estimate, paired
from lib.runs import HOUSEKEEPING
from lib.shapes import shapes
from lib.stochastic import reparameterise
from lib.train import Shuffled, generator

LEARNT_FROM = ("beta", "sigma", "z_dim", "dim", "n_train", "batch_size", "lr", "seed", "precision")
SCORES = {"mig": "MIG", "mig_draws": "MIG of draws", "dci_disentanglement": "DCI"}
METRICS = (*SCORES, "dci_completeness", "dci_informativeness", "active_units", "kl", "mse")


def check(parameters: dict) -> None:
    """Raise ValueError, before anything is drawn or trained, for values that would fail or mean nothing later."""
    for name, least in {"steps": 0, "batch_size": 2, "z_dim": 2, "n_train": 2, "n_test": 2, "replicas": 1}.items():
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")
    if parameters["batch_size"] > parameters["n_train"]:
        raise ValueError(f"a batch of {parameters['batch_size']} needs as many training scenes, got n_train = "
                         f"{parameters['n_train']}")
    if not (math.isfinite(parameters["beta"]) and parameters["beta"] >= 0):
        raise ValueError(f"beta must not be negative, got {parameters['beta']}")


def scenes(n_train: int, n_test: int) -> Dataset:
    """Freshly drawn scenes with their factors; 4,096 and 512 of them are the data set `shapes`.

    Raises ValueError: so few that a kind of shape is not among them, and no score could be given.
    """
    (x, train), (x_test, test) = shapes(n_train, seed=0), shapes(n_test, seed=1)
    if min(len(factors["shape"].unique()) for factors in (train, test)) < len(SHAPES):
        raise ValueError(f"{n_train} training and {n_test} test scenes do not show every kind of shape: draw more")
    digest = hashlib.sha256(x.numpy().tobytes() + x_test.numpy().tobytes()).hexdigest()
    return Dataset("shapes", x, x_test, train["shape"].long(), test["shape"].long(), SHAPES, digest,
                   {"train": train, "test": test})


def replica(parameters: dict, images: Tensor, device: torch.device, folder: Path | None = None) -> dict:
    """One seed's arguments for `train.fit_together`, from the notebook's parameters; the model is in state["model"].

    images: the training scenes, uint8 [N, 3, 64, 64], on the device; replicas share them.
    """
    seed, beta, sigma = (parameters[name] for name in ("seed", "beta", "sigma"))
    model = Autoencoder("beta-vae", (3, 64), parameters["z_dim"], parameters["dim"], MULTIPLIERS[64], sigma)
    model = model.initialise(generator(seed, use="weights")).to(device)
    step, state = training(model, generator(seed, device), parameters["lr"], beta)
    return {"step": step, "batches": Shuffled(images, parameters["batch_size"], seed), "state": state, "folder": folder,
            "title": f"seed {seed}", "config": {name: parameters[name] for name in LEARNT_FROM}}


@torch.no_grad()
def measure(model: Autoencoder, data: Dataset, noise: torch.Generator,
            n_train: int = 10_000) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """(metrics, information) of the means of q(z|x); see `disentanglement` for the scores.

    MIG, and the forests of DCI, are of the first n_train training scenes; what they predict, and active_units (Burda et
    al. 2015), kl in nats per image and mse per pixel on the [-1, 1] scale are of the test scenes. mig_draws: the MIG of
    draws of q(z|x), to which a dimension that has collapsed is noise, however little its mean still varies.
    information: nats that the mean of each dimension tells of each factor, {factor: [z_dim]}.
    """
    test, train = data.test.to(noise.device), data.train[:n_train].to(noise.device)
    factors = {name: values[:n_train] for name, values in data.factors["train"].items()}
    (means, log_vars), test_means = encode(model, train), encode(model, test)[0]
    metrics = disentanglement(means, factors, test_means, data.factors["test"])
    known = {name: values for name, values in factors.items() if name not in UNKNOWABLE}
    metrics["mig_draws"] = mig(reparameterise(means, log_vars, noise), known)["mig"]
    terms = autoencoders.evaluate(model, test, noise)
    metrics |= {"active_units": active_units(test_means), "kl": estimate(terms["kl"], "nats per image"),
                "mse": estimate(terms["mse"], "squared error per pixel")}
    return metrics, mutual_information(means, factors)


# ------------------------------------------------------------------------------------------------ many runs
def by_beta(records: list[dict], metric: str) -> dict[str, dict[float, dict[int, float]]]:
    """The metric of runs that differ in nothing but beta and seed: {setting in words: {beta: {seed: value}}}.

    Of repeated runs the newest counts.
    """
    found: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        own = record["parameters"]
        setting = {name: value for name, value in own.items() if name not in ("beta", "seed", *HOUSEKEEPING)}
        betas = found.setdefault(tuple((setting | {"data": record["dataset"]["sha256"][:8]}).items()), {})
        betas.setdefault(own["beta"], {})[own["seed"]] = record["metrics"][metric]["value"]
    names = _in_words([dict(setting) for setting in found])
    return dict(sorted((name, dict(sorted(betas.items()))) for name, betas in zip(names, found.values(), strict=True)))


def _in_words(settings: list[dict]) -> list[str]:
    """sigma, and what else the settings differ in."""
    differ = [name for name in dict.fromkeys(name for own in settings for name in own)
              if name != "sigma" and len({str(own.get(name)) for own in settings}) > 1]
    return [", ".join(f"{name} {own.get(name)}" for name in ("sigma", *differ)) for own in settings]


def claims(records: list[dict]):
    """Differences of the scores between the betas of each setting, paired by seed, as a pandas DataFrame.

    95 % intervals over seeds (`evaluate.paired`), each for itself. "less entangled": whether the scores say so of the
    larger beta: yes or no if the interval lies on one side of 0, else undecided.
    """
    import pandas as pd
    rows = []
    for metric, score in SCORES.items():
        for setting, betas in by_beta(records, metric).items():
            for small, large in itertools.combinations(betas, 2):
                seeds = sorted(set(betas[small]) & set(betas[large]))
                if len(seeds) > 1:
                    found = paired(*([betas[beta][seed] for seed in seeds] for beta in (large, small)), score)
                    rows.append({"score": score, "setting": setting, "beta": f"{large:g} against {small:g}",
                                 "pairs": len(seeds), "difference": f"{found['value']:+.3f}",
                                 "95 % interval": f"{found['low']:+.3f} to {found['high']:+.3f}",
                                 "less entangled": _verdict(found["low"], found["high"])})
    return pd.DataFrame(rows, columns=["score", "setting", "beta", "pairs", "difference", "95 % interval",
                                       "less entangled"])


def _verdict(low: float, high: float) -> str:
    return "yes" if low > 0 else "no" if high < 0 else "undecided"
