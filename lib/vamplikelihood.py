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
from lib.train import Shuffled, generator, load_checkpoint, precision
from lib.vampprior import VAE, codes, evaluate, pixels, prior, training, validation

MODELS = ("vae", "hvae", "convhvae")
METRICS = ("log_likelihood", "elbo", "kl_z2", "kl_z1", "active_z2", "active_z1", "ess", "epochs_done")
OF_PRIOR = ("components", "pseudo_init")                 # parameters that the standard prior does not have
BOUNDS = (10, 100)                                       # IWAE-k that are reported beside ELBO and log-likelihood
LEARNT_FROM = ("model", "prior", "dataset", "binarisation", "components", "pseudo_init", "hidden", "latent_dim",
               "warmup", "batch_size", "lr", "normalised", "seed", "precision")


def check(parameters: dict) -> None:
    """Raise ValueError, before anything is trained, for values that would fail or mean nothing later."""
    for name, least in {"epochs": 1, "batch_size": 1, "warmup": 0, "patience": 1, "samples": 1,
                        "n_likelihood": 0}.items():
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")
    if parameters["pseudo_init"] not in ("noise", "images"):
        raise ValueError(f"unknown pseudo_init {parameters['pseudo_init']!r}: use noise or images")


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

    losses: the validation losses of the epochs. elbo, rec, kl_* of all test images at one draw each; log_likelihood,
    iwae_k (iwae_1: the ELBO at all draws) and ess of the chosen ones; active_*: units whose mean, in the lower layer at
    the drawn z2, varies over all of them (Burda et al. 2015).
    """
    device = noise.device
    test = data.test.to(device)
    chosen = torch.randperm(len(test), generator=generator(0, use="likelihood images"))[:n or len(test)].to(device)
    with precision("fp32", device):
        components = model.components()

    def log_weights(x: Tensor, k: int) -> Tensor:
        rec, *kls = model.terms(x, noise, components, k)
        return rec - sum(kls)

    found = log_likelihood(log_weights, pixels(test[chosen]), samples, bounds(samples))
    found["iwae_1"] = found.pop("elbo")
    metrics = {name: estimate(values, "draws" if name == "ess" else "nats per image") for name, values in found.items()}
    terms, means = evaluate(model, test, noise), codes(model, test, noise)
    terms.setdefault("kl_z2", terms["kl"])
    metrics |= {name: estimate(values, "nats per image") for name, values in terms.items() if name != "kl"}
    means = {name.removeprefix("mean_"): mean for name, mean in means.items() if name.startswith("mean_")}
    metrics |= {f"active_{name}": active_units(mean) for name, mean in means.items()}
    metrics |= {"epochs_done": exact(len(losses), "epochs"), "best_epoch": exact(best_epoch(losses), "epochs")}
    return metrics, means


# ------------------------------------------------------------------------------------------------ many runs
def gains(records: list[dict]) -> list[dict]:
    """What each prior gains over the standard one: runs that differ in nothing else, images included, paired by seed.

    A dict for each prior and setting: prior, setting (in words), ours and standard (test log-likelihoods, nats per
    image, in the same order of seeds), published (the gain, None if it is not). Of repeated runs the newest counts.
    """
    standard, groups = {}, {}
    for record in sorted(records, key=lambda record: record["date"]):
        own, value = record["parameters"], record["metrics"]["log_likelihood"]["value"]
        same = _same(record, ("prior", *OF_PRIOR))
        if own["prior"] == "standard":
            standard[same, own["seed"]] = value
        else:
            groups.setdefault((_same(record, ()), same), {})[own["seed"]] = value
    names = _in_words([dict(setting) for setting, _ in groups])
    found = []
    for ((setting, same), values), name in zip(groups.items(), names, strict=True):
        own, seeds = dict(setting), [seed for seed in sorted(values) if (same, seed) in standard]
        if seeds:
            found.append({"prior": own["prior"], "setting": name, "ours": [values[seed] for seed in seeds],
                          "standard": [standard[same, seed] for seed in seeds], "published": _published_gain(own)})
    return found


def _same(record: dict, without: tuple[str, ...]) -> tuple:
    """What must agree for two records to be of one setting: all parameters but these, and the data."""
    skipped = ("seed", *without, *HOUSEKEEPING)
    own = {name: value for name, value in record["parameters"].items() if name not in skipped}
    return tuple((own | {"data": record["dataset"]["sha256"][:8]}).items())


def _in_words(settings: list[dict]) -> list[str]:
    """Settings as a reader knows them; what else they differ in comes after that."""
    usual = ("model", "dataset", "binarisation", "components", "epochs", "prior")
    differ = [name for name in (settings[0] if settings else ())
              if name not in usual and len({str(own[name]) for own in settings}) > 1]
    return [", ".join([f"{own['model']}, {own['dataset']} {own['binarisation']}, K = {own['components']}, "
                       f"{own['epochs']} epochs", *(f"{name} {own[name]}" for name in differ)]) for own in settings]


def _published_gain(own: dict) -> float | None:
    told = scoreboard.load()["vampprior_likelihood"].get(f"{own['binarisation']}_{own['dataset']}", {})
    names = f"{own['model']}_{own['prior']}", f"{own['model']}_standard"
    known = own["components"] == 500 and all(name in told for name in names)
    return told[names[0]] - told[names[1]] if known else None


def claims(records: list[dict]):
    """`gains` as a pandas DataFrame: mean gain, 95 % interval over seeds if there are two or more, published gain."""
    import pandas as pd
    rows = []
    for gain in gains(records):
        row = {"prior": gain["prior"], "setting": gain["setting"], "pairs": len(gain["ours"])}
        if row["pairs"] > 1:
            found = paired(gain["ours"], gain["standard"], "nats per image")
            row |= {"gain": f"{found['value']:+.2f}", "95 % interval": f"{found['low']:+.2f} to {found['high']:+.2f}"}
        else:
            row |= {"gain": f"{gain['ours'][0] - gain['standard'][0]:+.2f}", "95 % interval": "–"}
        rows.append(row | {"published": "–" if gain["published"] is None else f"{gain['published']:+.2f}"})
    return pd.DataFrame(rows, columns=["prior", "setting", "pairs", "gain", "95 % interval", "published"])


def by_components(records: list[dict]) -> list[tuple[int, float, float | None, str]]:
    """(K, test log-likelihood, its standard error, setting) of the VampPrior wherever nothing but K was varied.

    Of the seeds that ran with every K: the mean and its error over them or, of a single one, the run's own error, over
    its test images. Of repeated runs the newest counts.
    """
    groups: dict[tuple, dict[int, dict]] = {}
    for record in sorted(records, key=lambda record: record["date"]):
        own = record["parameters"]
        if own["prior"] == "vamp":
            sizes = groups.setdefault(_same(record, ("components",)), {})
            sizes.setdefault(own["components"], {})[own["seed"]] = record["metrics"]["log_likelihood"]
    points = []
    for setting, sizes in groups.items():
        own, seeds = dict(setting), sorted(set.intersection(*(set(runs) for runs in sizes.values())))
        for k, runs in sizes.items() if len(sizes) > 1 and seeds else ():
            metric = runs[seeds[0]]
            if len(seeds) > 1:
                metric = estimate(torch.tensor([runs[seed]["value"] for seed in seeds]), metric["unit"])
            name = f"{own['model']}, {own['dataset']} {own['binarisation']}, {own['epochs']} epochs"
            points.append((k, metric["value"], metric["se"], name))
    return points
