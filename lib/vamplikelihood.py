"""Test log-likelihoods of binarised images (Tomczak & Welling 2018, tables 1 and 2).

lib/vampprior.py on gated networks: binary pixels, KL warm-up, early stopping on the validation ELBO,
log p(x) by importance samples, in nats per image.
"""
from pathlib import Path

import torch
from torch import Tensor

from lib import binarised, scoreboard, vampnets
from lib.binarised import Binarised
from lib.evaluate import active_units, estimate, exact, log_likelihood, paired
from lib.runs import HOUSEKEEPING
from lib.train import Shuffled, generator, load_checkpoint
from lib.vampprior import VAE, codes, evaluate, pixels, prior, training, validation

MODELS = ("vae", "hvae", "convhvae")
CURVES = {"nats per image": {"loss": "training loss", "val_loss": "validation, -ELBO"},
          "-log p(x|z) [nats]": {"rec": "training", "val_rec": "validation"},
          "KL [nats]": {"kl": "training", "val_kl": "validation"}}
METRICS = ("log_likelihood", "elbo", "kl_z2", "kl_z1", "active_z2", "active_z1", "ess", "epochs_done")
BOUNDS = (10, 100)                                       # IWAE-k that are reported beside ELBO and log-likelihood
LEARNT_FROM = ("model", "prior", "dataset", "binarisation", "components", "pseudo_init", "hidden", "latent_dim",
               "warmup", "batch_size", "lr", "normalised", "seed", "precision")


def check(parameters: dict) -> None:
    """Raise ValueError, before anything is trained, for values that would fail or mean nothing later."""
    for name in ("epochs", "batch_size", "samples", "n_likelihood"):
        if parameters[name] < (0 if name in ("epochs", "n_likelihood") else 1):
            raise ValueError(f"{name} is too small: {parameters[name]}")
    if parameters["patience"] < 1:
        raise ValueError(f"patience must be at least 1 epoch, got {parameters['patience']}")


def bounds(samples: int) -> tuple[int, ...]:
    """The k of BOUNDS that divide the samples and are fewer."""
    return tuple(k for k in BOUNDS if k < samples and samples % k == 0)


def build(parameters: dict, images: Tensor) -> VAE:
    """The model of the notebook's parameters, on the CPU; images: the training images, uint8 [N, 1, 28, 28].

    Raises ValueError: unknown model, prior or start of the pseudo-inputs, sizes below 1.
    """
    weights = generator(parameters["seed"], use="weights")
    nets = vampnets.gated(parameters["model"], parameters["latent_dim"], parameters["hidden"])
    for net in nets.values():
        vampnets.initialise(net, "he", weights)
    own = prior(parameters["prior"], parameters["components"], parameters["latent_dim"], parameters["pseudo_init"],
                "clip", images, weights)
    return VAE(own, **nets)


def replica(parameters: dict, data: Binarised, device: torch.device, folder: Path | None = None) -> dict:
    """One seed's arguments for `train.fit_together`, from the notebook's parameters; log and save once an epoch.

    The model is in state["model"]. Raises ValueError as `build` and `training` do.
    """
    seed, patience, warmup = (parameters[name] for name in ("seed", "patience", "warmup"))
    model = build(parameters, data.train).to(device, memory_format=torch.channels_last)
    batches = Shuffled(data.train.to(device), parameters["batch_size"], seed)
    step, state = training(model, generator(seed, device), parameters["lr"], binarised.draw, warmup, batches.per_epoch,
                           parameters["normalised"])
    state["validation"] = generator(seed, device, use="validation")
    return {"step": step, "batches": batches, "state": state, "folder": folder, "title": f"seed {seed}",
            "config": {name: parameters[name] for name in LEARNT_FROM},
            "look": validation(model, data.valid.to(device), state["validation"]), "best_by": "val_loss",
            "stop": lambda history: exhausted(history["val_loss"], warmup, patience)}


def exhausted(losses: list[float], warmup: int, patience: int) -> bool:
    """Whether the lowest of the epochs' validation losses is more than `patience` epochs ago.

    Epochs before the last of the warm-up do not count (the rule of the paper's code).
    """
    return len(losses) - max(best_epoch(losses), warmup - 1) > patience


def best_epoch(losses: list[float]) -> int:
    """The epoch, from 1, with the lowest loss; 0 if there is none."""
    return min(range(len(losses)), key=losses.__getitem__) + 1 if losses else 0


def restore(job: dict) -> None:
    """Put the weights of the best epoch, those that early stopping keeps, into the model of a trained `replica`."""
    path = job["folder"] / "best.safetensors"
    if path.is_file():                                   # not there if no step was taken
        load_checkpoint(path, job["state"], job["config"])


@torch.no_grad()
def measure(model: VAE, data: Binarised, samples: int, n: int, losses: list[float],
            noise: torch.Generator) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """(metrics, means of the codes) on the test images, the likelihood on n random ones of them (0: all).

    losses: the validation losses of the epochs. elbo, rec, kl_* at one draw an image; active_*: units whose mean varies
    (Burda et al. 2015); ess: effective sample size, a warning if it is small.
    """
    device = noise.device
    test = data.test.to(device)
    chosen = torch.randperm(len(test), generator=generator(0, use="likelihood images"))[:n or len(test)].to(device)
    components = model.components()

    def log_weights(x: Tensor, k: int) -> Tensor:
        rec, *kls = model.terms(x, noise, components, k)
        return rec - sum(kls)

    found = log_likelihood(log_weights, pixels(test[chosen]), samples, bounds(samples))
    metrics = {name: estimate(values, "draws" if name == "ess" else "nats per image") for name, values in found.items()
               if name != "elbo"}
    terms, means = evaluate(model, test, noise), codes(model, test, noise)
    terms.setdefault("kl_z2", terms["kl"])
    metrics |= {name: estimate(values, "nats per image") for name, values in terms.items() if name != "kl"}
    means = {name.removeprefix("mean_"): mean for name, mean in means.items() if name.startswith("mean_")}
    metrics |= {f"active_{name}": active_units(mean) for name, mean in means.items()}
    metrics |= {"epochs_done": exact(len(losses), "epochs"), "best_epoch": exact(best_epoch(losses), "epochs")}
    return metrics, means


# ------------------------------------------------------------------------------------------------ many runs
def pairs(records: list[dict], prior: str = "vamp") -> dict[tuple, tuple[list[float], list[float]]]:
    """Test log-likelihoods of runs that differ in the prior alone: {setting: (with this prior, with the standard one)}.

    Paired by seed. A setting is (model, dataset, binarisation, components, epochs). Of repeated runs the newest counts.
    """
    found: dict[tuple, dict] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        own = record["parameters"]
        same = tuple((name, own[name]) for name in sorted(own) if name not in ("prior", "seed", *HOUSEKEEPING))
        found.setdefault(same, {})[own["prior"], own["seed"]] = record["metrics"]["log_likelihood"]["value"]
    out = {}
    for same, values in found.items():
        seeds = sorted(seed for kind, seed in values if kind == prior and ("standard", seed) in values)
        setting = tuple(dict(same)[name] for name in ("model", "dataset", "binarisation", "components", "epochs"))
        if seeds:
            out[setting] = [values[prior, seed] for seed in seeds], [values["standard", seed] for seed in seeds]
    return out


def published_gain(setting: tuple, prior: str = "vamp") -> float | None:
    """What the prior gains over the standard one in a setting of `pairs`, as published; None: it is not."""
    model, dataset, binarisation, *_ = setting
    told = scoreboard.load()["vampprior_likelihood"].get(f"{binarisation}_{dataset}", {})
    names = f"{model}_{prior}", f"{model}_standard"
    return told[names[0]] - told[names[1]] if all(name in told for name in names) else None


def described(setting: tuple) -> str:
    """A setting of `pairs` in words."""
    model, dataset, binarisation, components, epochs = setting
    return f"{model}, {dataset} {binarisation}, K = {components}, {epochs} epochs"


def claims(records: list[dict]):
    """What each prior gains over the standard one in test log-likelihood, nats per image: a pandas DataFrame.

    A row for each prior and setting: mean over the pairs of runs, their 95 % interval over seeds if there are two or
    more, and the published gain.
    """
    import pandas as pd
    rows = []
    for kind in ("vamp", "vamp-data", "mog"):
        for setting, (ours, standard) in pairs(records, kind).items():
            told = published_gain(setting, kind)
            row = {"prior": kind, "setting": described(setting), "pairs": len(ours)}
            if len(ours) > 1:
                gain = paired(ours, standard, "nats per image")
                row |= {"gain": f"{gain['value']:+.2f}", "95 % interval": f"{gain['low']:+.2f} to {gain['high']:+.2f}"}
            else:
                row |= {"gain": f"{ours[0] - standard[0]:+.2f}", "95 % interval": "–"}
            rows.append(row | {"published": "–" if told is None else f"{told:+.2f}"})
    return pd.DataFrame(rows, columns=["prior", "setting", "pairs", "gain", "95 % interval", "published"])


def by_components(records: list[dict]) -> list[tuple[int, float, float | None, str]]:
    """(K, mean test log-likelihood, its standard error, setting) of the VampPrior wherever K was varied.

    The error is over seeds if there are several, else the run's own, over its test images.
    """
    groups: dict[str, dict[int, list]] = {}
    for record in records:
        own = record["parameters"]
        if own["prior"] == "vamp":
            same = f"{own['model']}, {own['dataset']} {own['binarisation']}, {own['epochs']} epochs"
            groups.setdefault(same, {}).setdefault(own["components"], []).append(record["metrics"]["log_likelihood"])
    points = []
    for same, sizes in groups.items():
        for k, metrics in sizes.items() if len(sizes) > 1 else ():
            values = torch.tensor([metric["value"] for metric in metrics])
            over = estimate(values, "nats per image") if len(metrics) > 1 else metrics[0]
            points.append((k, over["value"], over["se"], same))
    return points
