"""Test log-likelihoods of binarised images (Tomczak & Welling 2018, tables 1 and 2).

lib/vampprior.py on gated networks: binary pixels, KL warm-up, early stopping on the validation ELBO,
log p(x) by importance samples, in nats per image.
"""
from pathlib import Path

import torch
from torch import Tensor

from lib import binarised, vampnets
from lib.binarised import Binarised
from lib.evaluate import active_units, estimate, exact, log_likelihood
from lib.train import Shuffled, generator, load_checkpoint
from lib.vampprior import VAE, codes, evaluate, pixels, prior, training, validation

MODELS = ("vae", "hvae", "convhvae")
CURVES = {"nats per image": {"loss": "training loss", "val_loss": "validation, -ELBO"},
          "-log p(x|z) [nats]": {"rec": "training", "val_rec": "validation"},
          "KL [nats]": {"kl": "training", "val_kl": "validation"}}
METRICS = ("log_likelihood", "elbo", "kl_z2", "kl_z1", "active_z2", "active_z1", "epochs")
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
    metrics |= {"epochs": exact(len(losses), "epochs"), "best_epoch": exact(best_epoch(losses), "epochs")}
    return metrics, means
