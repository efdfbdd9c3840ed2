"""Semantic hashing with DisARM: the plain dense loop beside the book's step.

The plain loop keeps the smoothed counts as one dense matrix and follows the work's code: the two codes of the
antithetic pair are decoded one by one, and a third for the NELBO that is logged, with its analytic KL. The book's step
decodes the pair in one product, keeps the documents sparse (on CUDA as small integers) and logs what the pair has
shown. What `semhash.learn` evaluates after every epoch (`look`) is no part of either.
"""
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import BenchmarkError, looped
from lib import documents, semhash
from lib.bags import Corpus

SETTINGS = {"batch": 256, "encoder": "e1", "decoder_depth": 0, "bits": 64, "hidden": 512, "estimates": 1, "lr": 1e-3,
            "dataset": "newsgroups", "seed": 1, "item_every": 1}
CUDA = {}
METRIC = "loss"
SIZE = {name: SETTINGS[name] for name in ("batch", "encoder", "decoder_depth", "bits", "estimates", "dataset")}
AIMS = [{"device": "cpu", "settings": SIZE, "ratio": 2.0}, {"device": "cuda", "settings": SIZE, "ratio": 5.0}]


def data(settings: dict) -> Tensor:
    """The counts of the training documents, sparse CSR [N, V], N a multiple of the batch.

    The documents beyond that are left out: the book keeps an incomplete last batch, which would be less work.
    Raises DataError if the data set is not there, ValueError if it has not enough documents for one batch.
    """
    counts = documents.load(settings["dataset"]).train
    n = len(counts) // settings["batch"] * settings["batch"]
    if not n:
        raise ValueError(f"{settings['dataset']} has {len(counts)} training documents, too few for a batch of "
                         f"{settings['batch']}")
    rows = counts.crow_indices()[:n + 1]
    kept = slice(rows[-1].item())
    return torch.sparse_csr_tensor(rows, counts.col_indices()[kept], counts.values()[kept], (n, counts.shape[1]),
                                   check_invariants=True)


def fed(counts: Tensor) -> Tensor:
    """What the plain loop has its batches from: all smoothed counts, float32 [N, V]."""
    return counts.to_dense().add_(documents.smoothing(counts))


def book(settings: dict, counts: Tensor, device: torch.device, precision: str = "tf32", compiled: bool = False) -> dict:
    """The arguments of `train.fit` for the book's step, of one estimate or, as when fine-tuning, of several.

    Raises ValueError: a setting that there is not; BenchmarkError: compiled.
    """
    if compiled:
        raise BenchmarkError("the step computes its gradients itself, so there is no network to compile")
    parameters = settings | {"input": "", "estimator": "disarm", "kl": "sampled", "batch_size": settings["batch"],
                             "precision": precision, "epochs": 1, "finetune_epochs": 0,
                             "finetune_estimates": settings["estimates"], "replicas": 1}
    semhash.check(parameters)
    counts = counts.cpu()                                           # where a notebook has them, too
    corpus = Corpus(counts, documents.smoothing(counts), device, dense=device.type == "cuda")
    one = semhash.replica(parameters, corpus, corpus, device)
    return semhash.job(one, estimates=settings["estimates"]) | {"look": None}


# ------------------------------------------------------------------------------------------------ the plain loop
class Hashing(nn.Module):
    """q(z|x) of `bits` independent bits and p(x|z), for V words."""

    def __init__(self, words: int, bits: int, encoder: str, depth: int, hidden: int):
        super().__init__()
        reads, layered = semhash.ENCODERS[encoder]
        self.frequencies = reads == "frequencies"
        self.encoder = nn.Linear(words, bits)
        if layered:
            self.encoder = nn.Sequential(nn.Linear(words, hidden), nn.LeakyReLU(), nn.Linear(hidden, bits))
        layers = [part for a, b in pairwise([bits] + [hidden] * depth) for part in (nn.Linear(a, b), nn.LeakyReLU())]
        self.decoder = nn.Sequential(*layers, nn.Linear(hidden if depth else bits, words), nn.LogSoftmax(1))

    def encode(self, x: Tensor) -> Tensor:
        """Logits [B, bits]."""
        return self.encoder(x / x.sum(1, keepdim=True) if self.frequencies else x)

    def nll(self, z: Tensor, x: Tensor) -> Tensor:
        """-x . log p(.|z), nats per document [B]."""
        return -(x * self.decoder(z)).sum(1)


def surrogate(model: Hashing, x: Tensor, logits: Tensor) -> Tensor:
    """A number whose gradient is DisARM's for the logits and that of both samples' mean for the decoder."""
    u, p = torch.rand_like(logits), logits.sigmoid()
    z, z_anti = (u > torch.sigmoid(-logits)).float(), (u < p).float()
    nll, nll_anti = model.nll(z, x), model.nll(z_anti, x)
    with torch.no_grad():
        f, f_anti = nll + log_q(z, logits), nll_anti + log_q(z_anti, logits)
        slope = (f - f_anti)[:, None] / 2 * (-1) ** z_anti * (z != z_anti) * torch.maximum(p, 1 - p)
    return ((slope * logits).sum(1) + (nll + nll_anti) / 2).mean()


def log_q(z: Tensor, logits: Tensor) -> Tensor:
    """log q(z|x), nats per document [B]."""
    return -F.binary_cross_entropy_with_logits(logits, z, reduction="none").sum(1)


def plain(settings: dict, counts: Tensor, batches, device: torch.device):
    """(loop, model): loop(steps) trains on the next `batches` of `fed` and returns the logged metrics."""
    torch.manual_seed(settings["seed"])
    model = Hashing(counts.shape[1], *(settings[name] for name in ("bits", "encoder", "decoder_depth", "hidden")))
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])

    def step(x: Tensor) -> dict[str, Tensor]:
        logits = model.encode(x)
        found = sum(surrogate(model, x, logits) for _ in range(settings["estimates"])) / settings["estimates"]
        optimizer.zero_grad()
        found.backward()
        with torch.no_grad():
            entropy = (x * (x / x.sum(1, keepdim=True)).log()).sum(1)
            nelbo = entropy + model.nll(logits.sigmoid().bernoulli(), x)
            kl = logits.sigmoid() * logits - F.softplus(logits) + math.log(2)
        optimizer.step()
        return {"loss": (nelbo + kl.sum(1)).mean(), "kl": kl.sum(1).mean()}

    return looped(step, batches, settings["item_every"]), model
