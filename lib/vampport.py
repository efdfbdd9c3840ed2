"""The TensorFlow port of the VampPrior: convolutional VAE and HVAE on grey images (lib/vampprior.py, lib/vampnets.py).

Grey pixels in [0, 1] under a Bernoulli cross-entropy and validation on the test images, as in the port: its ELBO is no
bound of a log-likelihood and is not comparable with those of lib/vamplikelihood.py (known fault 12). Nats per image.
"""
from pathlib import Path

import torch
from torch import Tensor

from lib import classifier, embedding, root, runs, vampnets
from lib.binarised import GREY
from lib.classifier import Classifier
from lib.data import Dataset
from lib.evaluate import estimate, exact
from lib.train import Shuffled, generator
from lib.vampprior import VAE, codes, evaluate, prior, sample, training, validation

NET = ("model", "latent_dim", "network_size", "activation")
METRICS = ("elbo_val", "elbo_train", "elbo_val_by_batches", "kl_val", "cfd_prior", "cfd_normal", "inside_normal",
           "code_spread")
LEARNT_FROM = ("model", "prior", "dataset", "lr", "batch_size", "latent_dim", "network_size", "activation",
               "components", "pseudo_init", "seed", "precision")


def check(parameters: dict) -> None:
    """Raise ValueError, before anything is trained, for values that would fail or mean nothing later."""
    for name, least in {"epochs": 1, "batch_size": 1, "n_train": 0, "n_generated": 2, "components": 1}.items():
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")
    for name, known in {"dataset": GREY, "prior": ("standard", "vamp"), "pseudo_init": ("images", "inverse")}.items():
        if parameters[name] not in known:
            raise ValueError(f"unknown {name} {parameters[name]!r}: use {', '.join(known)}")
    with torch.device("meta"):
        vampnets.port(*(parameters[name] for name in NET))


def build(parameters: dict, images: Tensor) -> VAE:
    """The model of the notebook's parameters, on the CPU; images: the training images, uint8 [N, 1, 28, 28].

    Raises ValueError: see `vampnets.port` and `vampprior.prior`.
    """
    weights = generator(parameters["seed"], use="weights")
    nets = vampnets.port(*(parameters[name] for name in NET))
    for net in nets.values():
        vampnets.initialise(net, "glorot", weights)
    d = parameters["latent_dim"] // (2 if "lower" in nets else 1)
    own = prior(parameters["prior"], parameters["components"], d, parameters["pseudo_init"], "hard-sigmoid", images,
                weights)
    return VAE(own, **nets)


def replica(parameters: dict, data: Dataset, device: torch.device, folder: Path | None = None) -> dict:
    """One seed's arguments for `train.fit_together`, from the notebook's parameters; log and save once an epoch.

    The model is in state["model"]. Raises ValueError as `build` does, or if lr is not positive.
    """
    seed = parameters["seed"]
    model = build(parameters, data.train).to(device, memory_format=torch.channels_last)
    step, state = training(model, generator(seed, device), parameters["lr"])
    state["validation"] = generator(seed, device, use="validation")
    return {"step": step, "batches": Shuffled(data.train.to(device), parameters["batch_size"], seed), "state": state,
            "config": {name: parameters[name] for name in LEARNT_FROM}, "folder": folder, "title": f"seed {seed}",
            "look": validation(model, data.test.to(device), state["validation"])}


def judge(data: Dataset, device: torch.device) -> Classifier:
    """The classifier of the data set's grey images, whose features the CFD compares."""
    return classifier.load_or_train(data, None, device=device)


@torch.no_grad()
def measure(model: VAE, data: Dataset, net: Classifier, batch_size: int, n_train: int, n_generated: int,
            noise: torch.Generator) -> dict[str, dict]:
    """Every metric of the chapter's first half.

    elbo_val, rec_val, kl_* of the test images, elbo_train of the first n_train training images (0: all), at one draw
    each; elbo_val_by_batches: elbo_val as the port averages it (known fault 14); cfd_prior and cfd_normal: n_generated
    images drawn from the learned prior and from N(0, I) (known fault 10) against the test images, cfd_train: as many
    training images; inside_normal: fraction of test codes within the ball that holds 99 % of N(0, I); code_spread: root
    mean variance of a test code's dimension.
    """
    from scipy.stats import chi2
    device = noise.device
    test, train = data.test.to(device), data.train[:n_train or None].to(device)
    terms = evaluate(model, test, noise)
    metrics = {f"{name}_val": estimate(values, "nats per image") for name, values in terms.items()}
    by_batches = torch.stack([part.mean() for part in terms["elbo"].split(batch_size)])
    metrics["elbo_val_by_batches"] = exact(by_batches.mean(), "nats per image")
    metrics["elbo_train"] = estimate(evaluate(model, train, noise)["elbo"], "nats per image")
    known = classifier.moments(net, test)
    drawn = {"prior": sample(model, n_generated, noise), "normal": sample(model, n_generated, noise, normal=True)}
    for name, pictures in drawn.items():
        metrics[f"cfd_{name}"] = classifier.cfd(net, (255 * pictures).round().to(torch.uint8), known)
    metrics["cfd_train"] = classifier.cfd(net, data.train[:n_generated].to(device), known)
    z = codes(model, test, noise)
    z = torch.cat([z[name] for name in ("z2", "z1") if name in z], 1).double()
    inside = z.square().sum(1) <= chi2.ppf(0.99, z.shape[1])
    return metrics | {"inside_normal": estimate(inside.double(), "fraction"),
                      "code_spread": exact(z.var(0).mean().sqrt(), "latent units")}


@torch.no_grad()
def latent_maps(model: VAE, images: Tensor, noise: torch.Generator) -> tuple[dict, tuple[str, str], Tensor | None]:
    """Codes of uint8 images [N, 1, 28, 28] in the plane: ({title: [N, 2]}, the axes' names, the prior's means [K, d]).

    Two panels: a draw of q(z|x) and its mean, all layers together. One dimension is spread at random, more than two are
    embedded by UMAP (then, and in an HVAE's second dimension, there are no means of the prior to show: None, [K, 1]).
    """
    found = codes(model, images, noise)
    panels = {}
    for title, kind in (("a draw of q(z|x)", ""), ("mean of q(z|x)", "mean_")):
        z = torch.cat([found[kind + name] for name in ("z2", "z1") if kind + name in found], 1)
        if z.shape[1] == 1:
            z = torch.cat([z, torch.randn(z.shape, generator=noise, device=z.device)], 1)
        panels[title] = z.cpu() if z.shape[1] == 2 else embedding.umap(z)
    d = sum(found[name].shape[1] for name in ("z2", "z1") if name in found)
    if d > 2:
        return {f"UMAP of {title}": z for title, z in panels.items()}, ("UMAP 1", "UMAP 2"), None
    axes = ("$z$", "at random") if d == 1 else ("$z_2$", "$z_1$") if model.lower else ("first of $z$", "second of $z$")
    return panels, axes, model.components()[0].cpu()


def grid_search(key: str, saved: list[dict]):
    """The complete runs of a grid-search key, the present ones included: a pandas DataFrame, a row for each setting.

    saved: the records of the notebook under way, which are not complete before it is. Columns: what differs.
    """
    own = {record["run"] for record in saved}
    found = saved + [record for record in runs.records("vampprior", root() / "runs")
                     if record["parameters"].get("gs_key") == key and record["run"] not in own]
    skipped = ("seed", "gs_key", *runs.HOUSEKEEPING)
    differ = [name for name in saved[0]["parameters"] if name not in skipped
              and len({str(record["parameters"].get(name)) for record in found}) > 1]
    return runs.table(found, ["elbo_val", "elbo_train", "kl_val"], differ).drop(columns="size")
