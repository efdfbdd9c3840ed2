"""VAE and AE of VAEs-Implementations: the plain loop beside the book's step.

The networks are the same modules (those of lib are plain ones); the plain loop keeps tensors contiguous and writes the
loss as the work's code does: mean squared error + sum over z of (mu^2 + var - log var - 1) / pixels.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from lib import data as datasets
from lib import train
from lib.autoencoders import Autoencoder, training

SETTINGS = {"batch": 256, "model": "vae", "lr": 1e-3, "dataset": "mnist", "seed": 1, "item_every": 1}
CUDA = {}
METRIC = "loss"
AIMS = []


def data(settings: dict) -> Tensor:
    """The training images, uint8 [N, 1, 32, 32]. Raises DataError if the data set is not there."""
    return datasets.load(settings["dataset"], size=32).train


def book(settings: dict, images: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step; `compiled`: both networks by torch.compile."""
    model = _model(settings, device)
    step, state = training(model, train.generator(settings["seed"], device), settings["lr"])
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    batches = train.Shuffled(images.to(device), settings["batch"], settings["seed"])
    return {"step": step, "state": state, "batches": batches, "config": {}}


def _model(settings: dict, device: torch.device) -> Autoencoder:
    model = Autoencoder(settings["model"], (1, 32))
    return model.initialise(train.generator(settings["seed"], use="weights")).to(device)


def plain(settings: dict, images: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` and returns the logged metrics, {name: number} each.

    Raises ValueError: a model other than vae and ae.
    """
    if settings["model"] not in ("vae", "ae"):
        raise ValueError(f"the plain loop knows the models vae and ae, not {settings['model']!r}")
    torch.manual_seed(settings["seed"])
    model = _model(settings, device).train()
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.decoder.parameters()], lr=settings["lr"])

    def losses(x: Tensor) -> dict[str, Tensor]:
        mean, log_var = model.encoder(x)
        if settings["model"] == "ae":
            rec = F.mse_loss(model.decoder(mean), x)
            return {"loss": rec, "rec": rec}
        z = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        rec = F.mse_loss(model.decoder(z), x)
        kl = (mean ** 2 + log_var.exp() - log_var - 1).sum(1).mean()
        return {"loss": rec + kl / x[0].numel(), "rec": rec, "kl": kl / 2}

    def loop(steps: int) -> list[dict[str, float]]:
        logged = []
        for t, batch in zip(range(1, steps + 1), batches, strict=False):
            metrics = losses(batch.float() / 127.5 - 1)
            optimizer.zero_grad()
            metrics["loss"].backward()
            optimizer.step()
            if t % settings["item_every"] == 0:
                logged.append({name: value.item() for name, value in metrics.items()})
        return logged

    return loop, model
