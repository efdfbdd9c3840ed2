"""Bias, variance and cost of the gradient estimators of bits, against the gradient with all codes enumerated.

The gradient is that of the mean NELBO of some fixed documents, in the parameters of the layer that gives the logits (a
linear encoder: all of them): what a step of learning follows. The NLL and its slope in the bits are computed once for
each of the 2^b codes of each document; an estimate looks them up, so that draws cost next to nothing and every
estimator sees the same function.

With e_k the error of draw k, the mean of <e_k, e_l> over k != l is the squared bias without the noise that makes the
length of a mean error positive for any estimator: for an unbiased one its interval contains 0.
"""
import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import semhash, stochastic
from lib.bags import Corpus
from lib.documents import Documents, smoothing
from lib.evaluate import estimate as mean_of
from lib.evaluate import exact as known
from lib.semhash import KL
from lib.stochastic import ESTIMATORS
from lib.train import adam, generator, precision

MOST_BITS = 8
ALONE = {"finetune_epochs": 0, "finetune_estimates": 1, "replicas": 1}       # what the study does not have of `semhash`
SETTING = ("dataset", "encoder", "bits", "decoder_depth", "estimator")         # by which recorded runs are told apart
UNIT = "squared length of the exact gradient"


# ------------------------------------------------------------------------------------------------ enumeration
def codes(bits: int, like: Tensor) -> Tensor:
    """All codes [2^b, b], the first bit slowest, of the type and device of `like`. ValueError unless 1 <= b <= 8."""
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"all 2^bits codes are enumerated: bits must be between 1 and {MOST_BITS}, got {bits}")
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=bits)), dtype=like.dtype, device=like.device)


def enumerate_nll(nll: Callable, documents: int, every: Tensor) -> tuple[Tensor, Tensor]:
    """f [D, 2^b], the NLL of D documents for every code [2^b, b] in nats, and its slope in the bits: [D, 2^b, b].

    nll takes bits [2^b, D, b] to (the sum of all, differentiable; values [2^b, D]).
    """
    z = every.unsqueeze(1).repeat(1, documents, 1).requires_grad_()
    total, f = nll(z)
    return f.detach().T.contiguous(), torch.autograd.grad(total, z)[0].transpose(0, 1).contiguous()


def log_q(logits: Tensor) -> Tensor:
    """log q(z) of all codes for each row of logits: [D, b] -> [D, 2^b] in nats."""
    return logits @ codes(logits.shape[-1], logits).T - F.softplus(logits).sum(-1, keepdim=True)


def exact(logits: Tensor, f: Tensor) -> Tensor:
    """Gradient of E f(z), z ~ Bernoulli(sigmoid(logits)), for the logits [D, b]: f [D, 2^b] -> [D, b].

    It is sigmoid'(l_j) (E[f | z_j = 1] - E[f | z_j = 0]), which is the covariance of f and z_j.
    """
    q = log_q(logits.detach()).exp()
    return (q * (f - (q * f).sum(-1, keepdim=True))) @ codes(logits.shape[-1], logits)


def zgr_mean(logits: Tensor, slope: Tensor) -> Tensor:
    """The mean of ZGR's estimates, logits [D, b] and slope [D, 2^b, b] of `enumerate_nll`: [D, b]."""
    leaf, every = logits.detach().requires_grad_(), codes(logits.shape[-1], logits)
    z = stochastic.zgr_at(every.expand(len(leaf), -1, -1), leaf.unsqueeze(1))
    return torch.autograd.grad(z, leaf, log_q(logits.detach()).exp().unsqueeze(-1) * slope)[0]


# ------------------------------------------------------------------------------------------------ estimates
def draw(name: str, logits: Tensor, f: Tensor, slope: Tensor, noise: torch.Generator) -> Tensor:
    """One estimate of the gradient for each row of logits [..., D, b], f and slope of `enumerate_nll`: [..., D, b].

    Two codes an estimate, or one (zgr). Raises ValueError: an unknown name.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}: use {', '.join(ESTIMATORS)}")
    if name == "zgr":
        leaf = logits.detach().requires_grad_()
        z = stochastic.zgr(leaf, noise)
        return torch.autograd.grad(z, leaf, _at(slope, z))[0]
    if name == "reinforce-loo":
        z, other = stochastic.bernoulli(logits, noise), stochastic.bernoulli(logits, noise)
        return stochastic.reinforce_loo(logits, z, other, _at(f, z), _at(f, other))
    z, other, u = stochastic.antithetic(logits, noise)
    if name == "arm":
        return stochastic.arm(u, _at(f, z), _at(f, other))
    return stochastic.disarm(logits, z, other, _at(f, z), _at(f, other))


def _at(values: Tensor, z: Tensor) -> Tensor:
    """values [D, 2^b, ...] of the codes z [..., D, b]."""
    powers = 2 ** torch.arange(z.shape[-1] - 1, -1, -1, device=z.device)
    return values[torch.arange(len(values), device=z.device), (z.detach().long() * powers).sum(-1)]


def metric(logits: Tensor, parameters: list[Tensor]) -> Tensor:
    """Inner products [D b, D b] of the gradients of all logits [D, b] in the parameters, each divided by D.

    With it two gradients for the logits are compared as they act on the parameters, in the mean over D documents.
    """
    rows = [torch.autograd.grad(logit, parameters, retain_graph=True) for logit in logits.flatten()]
    rows = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]) / len(logits)
    return rows @ rows.T


# ------------------------------------------------------------------------------------------------ bias and variance
def measure(logits: Tensor, parameters: list[Tensor], nll: Callable, noise: torch.Generator, kl: str = "sampled",
            draws: int = 4000, blocks: int = 40) -> dict[str, dict[str, dict]]:
    """{estimator: {"bias2", "variance", "cosine"}} at D documents, each a metric with its standard error.

    logits [D, b] = encoder(x) with its graph; parameters: of the encoder's last layer; nll: see `enumerate_nll`; kl:
    see `semhash.gradient`; best in float64. bias2: squared bias; variance: trace of the covariance of one step's
    gradient, an estimate for each of the D documents, both in units of the exact gradient's squared length; cosine: of
    such a step with the exact gradient, the mean. "documents" has the variance that comes from the choice of D
    documents, "zgr" also "enumerated": its bias2 without noise (that of the others is 0). Raises ValueError: too many
    bits, too few draws or documents, a gradient of length zero.
    """
    if blocks < 3 or draws < blocks or len(logits) < 2:
        raise ValueError("bands need at least 3 blocks, a draw in each and 2 documents, got "
                         f"{blocks} blocks, {draws} draws and {len(logits)} documents")
    fixed = logits.detach()
    f, slope = enumerate_nll(nll, len(fixed), codes(fixed.shape[-1], fixed))
    own, p, seen = metric(logits, parameters), fixed.sigmoid(), f + log_q(fixed) if kl == "sampled" else f
    whole = exact(fixed, f) + fixed * p * (1 - p)                                           # the KL's: l p (1 - p)
    many, found = fixed.expand(blocks, draws // blocks, *fixed.shape), {}
    for name in ESTIMATORS:
        values = f if name == "zgr" else seen
        errors = draw(name, many, values, slope, noise) - exact(fixed, values)
        found[name] = describe(errors.flatten(2), whole.flatten(), own)
    off = (zgr_mean(fixed, slope) - exact(fixed, f)).flatten()
    found["zgr"]["enumerated"] = known((off @ own @ off) / (whole.flatten() @ own @ whole.flatten()), UNIT)
    alone = torch.eye(len(p), dtype=p.dtype, device=p.device).unsqueeze(-1) * whole         # [D, D, b]: one each
    apart = (len(p) * alone - whole).flatten(1)
    apart = (apart @ own * apart).sum(1) / (len(p) - 1) / (whole.flatten() @ own @ whole.flatten())
    return found | {"documents": {"variance": mean_of(apart, UNIT)}}


def describe(errors: Tensor, whole: Tensor, own: Tensor) -> dict[str, dict]:
    """bias2, variance and cosine (see `measure`) from errors [blocks, m, n] of estimates of whole [n], own: `metric`.

    Standard errors over blocks: of the variance by the jackknife, of bias2 by `_error_of_bias2`. ValueError: the whole
    is zero.
    """
    sums, size, length2 = errors.sum(1), errors.shape[1], whole @ own @ whole
    if not length2 > 0:
        raise ValueError("the exact gradient is zero: there is nothing to compare estimates with")
    gram, squares, along = sums @ own @ sums.T, (errors @ own * errors).sum(-1), errors @ own @ whole

    def statistics(keep: Tensor) -> Tensor:
        n, total, square = size * len(keep), gram[keep][:, keep].sum(), squares[keep].sum()
        return torch.stack([(total - square) / (n * (n - 1)), (square - total / n) / (n - 1)]) / length2

    n = len(gram)
    every = torch.arange(n, device=gram.device)
    bias2, variance = statistics(every).tolist()
    left_out = torch.stack([statistics(every[every != k])[1] for k in every])
    lengths = (length2 + 2 * along + squares).clamp_min(torch.finfo(length2.dtype).tiny).sqrt()     # of the estimates
    cosines = ((length2 + along) / (length2.sqrt() * lengths)).mean(1)
    found = {"bias2": (bias2, _error_of_bias2(gram / size ** 2) / length2, UNIT),
             "variance": (variance, ((n - 1) * left_out.var(correction=0)).sqrt(), UNIT),
             "cosine": (cosines.mean().item(), cosines.std() / n ** 0.5, "cosine")}
    return {name: {"value": value, "se": se.item(), "n": size * n, "unit": unit}
            for name, (value, se, unit) in found.items()}


def _error_of_bias2(gram: Tensor) -> Tensor:
    """Standard error of the mean of gram[k, l] = <e_k, e_l> over k != l, for K independent e_k of mean m, covariance C.

    Its square is 4 m'Cm / K + 2 tr(C^2) / K^2, tr(C^2) estimated without bias (Bai & Saranadasa 1996). The jackknife,
    good where m dominates, gives an error of about 0 where the mean of the e_k happens to be so.
    """
    n, along = len(gram), gram.mean(0) - gram.mean()
    centred = gram - gram.mean(0) - along[:, None]
    square = (centred.square().sum() - centred.trace().square() / (n - 1)).clamp_min(0) / ((n + 1) * (n - 2))
    linear = (along.square().sum() / (n - 1) - square / n).clamp_min(0)
    return (4 * linear / n + 2 * square / n ** 2).sqrt()


# ------------------------------------------------------------------------------------------------ over training
def milestones(epochs: int) -> list[int]:
    """Epochs after which is measured: 0, 1, 3, 10, 30, ... and the last."""
    return [k for k in (0, 1, 3, 10, 30, 100, 300, 1000) if k < epochs] + [epochs]


def study(parameters: dict, documents: Documents, device: torch.device, folder: Path) -> tuple[dict, dict, dict]:
    """Train by one estimator and measure all at `milestones`: ({epoch: `measure`}, history, what `costs` takes).

    parameters: the notebook's. The gradient is that of as many training documents as it says, drawn by the seed, the
    same at all epochs. Raises ValueError: see `semhash.check` and `measure`.
    """
    own = parameters | ALONE
    semhash.check(own | {"epochs": max(1, own["epochs"])})         # none at all is a study too
    codes(own["bits"], torch.empty(0))
    if not 2 <= own["documents"] <= len(documents.train):
        raise ValueError(f"documents must be between 2 and {len(documents.train)}, got {own['documents']}")
    items = torch.randperm(len(documents.train), generator=generator(own["seed"], use="documents"))[:own["documents"]]
    bag = Corpus(documents.train, smoothing(documents.train), device).batch(items.to(device))    # sparse: for float64
    job = semhash.replica(own, *semhash.corpora(documents, device), device, folder)
    noise, found, history = generator(own["seed"], device, "estimates"), {}, {}
    for epoch in milestones(own["epochs"]):
        if epoch:
            history, = semhash.learn([job | {"parameters": own | {"epochs": epoch}}], "latest" if history else "")
        found[epoch] = at_model(job["state"]["model"], bag, noise, own["kl"], own["draws"])
    return found, history, job | {"bag": bag, "noise": noise}


def at_model(model: nn.Module, bag, noise: torch.Generator, kl: str, draws: int) -> dict[str, dict[str, dict]]:
    """`measure` of a SemanticHashing at the documents of a SparseBag, in float64; the model stays as it is."""
    model = copy.deepcopy(model).double()
    last = model.words_in if isinstance(model.code, nn.Identity) else model.code[-1]

    def nll(z: Tensor) -> tuple[Tensor, Tensor]:
        total, counted, smooth = model.nll(z, bag, torch.ones_like(bag.total))
        return total, counted + smooth
    with precision("fp32", bag.total.device):
        return measure(model.encode(bag), list(last.parameters()), nll, noise, kl, draws)


# ------------------------------------------------------------------------------------------------ cost
def costs(job: dict, rounds: int = 20) -> dict[str, dict[str, dict]]:
    """{estimator: {"ms", "cost"}} of a training step: milliseconds, and how many times a step by DisARM it takes.

    job: of `study`. Every estimator trains a copy of the model on the same batch, uncaptured, in turns of a few steps.
    """
    own, corpus = job["parameters"], job["train"]
    items = torch.arange(min(own["batch_size"], len(corpus)), device=corpus.device)

    def step_of(name: str) -> Callable:
        model = copy.deepcopy(job["state"]["model"])
        step = semhash.training(model, corpus, generator(own["seed"], corpus.device, "costs"),
                                adam(model.parameters(), own["lr"]), estimator=name, kl=own["kl"], size=len(items))
        return lambda: step(items)
    with precision(own["precision"], corpus.device):
        return in_turns({name: step_of(name) for name in ESTIMATORS}, corpus.device, rounds)


def in_turns(steps: dict[str, Callable], device: torch.device, rounds: int, repeats: int = 3) -> dict[str, dict]:
    """{name: {"ms": time of a step, "cost": its ratio to the first's}}, measured in rounds, in each a turn of all.

    Of every five rounds the fastest counts: what else the machine does only adds. ValueError: fewer than five rounds.
    """
    if rounds < 5:
        raise ValueError(f"the timing needs at least 5 rounds, got {rounds}")

    def turn(step: Callable) -> float:
        step()
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(device)
        return 1e3 * (time.perf_counter() - start) / repeats
    times = torch.tensor([[turn(step) for step in steps.values()] for _ in range(rounds // 5 * 5)], dtype=torch.float64)
    times = times.unflatten(0, (-1, 5)).amin(1)
    return {name: {"ms": mean_of(times[:, i], "ms per step"),
                   "cost": mean_of(times[:, i] / times[:, 0], f"steps by {next(iter(steps))}")}
            for i, name in enumerate(steps)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ what was found
def metrics(told: dict, cost: dict) -> dict[str, dict]:
    """One `measure` and `costs` as the metrics of a run: <metric>_<estimator>."""
    return {f"{metric}_{name}".replace("-", "_"): value for part in (told, cost) for name, own in part.items()
            for metric, value in own.items()}


def history_of(found: dict[int, dict]) -> dict[str, list]:
    """{epoch: `measure`} as the history of a run: epoch, and value and standard error of each metric."""
    history = {"epoch": list(found)}
    for told in found.values():
        for name, metric in metrics(told, {}).items():
            history.setdefault(name, []).append(metric["value"])
            history.setdefault(f"{name}_se", []).append(metric["se"])
    return history


def table(told: dict, other: dict, cost: dict, names: tuple[str, str] = KL):
    """A pandas DataFrame, a row for each estimator: bias as an interval of ±2 standard errors, variance, cosine, cost.

    told, other: `measure` with the KL in the gradient as the two `names` say.
    """
    import pandas as pd

    def pm(metric: dict) -> str:
        return f"{metric['value']:.3g}" + (f" ± {metric['se']:.1g}" if metric["se"] else "")

    def interval(metric: dict) -> str:
        low, high = (100 * max(0.0, metric["value"] + sign * 2 * metric["se"]) ** 0.5 for sign in (-1, 1))
        return f"{low:.2g} to {high:.2g}"
    rows = {name: {"bias [%]": interval(told[name]["bias2"]), "cosine": pm(told[name]["cosine"]),
                   f"variance, KL {names[0]}": pm(told[name]["variance"]),
                   f"variance, KL {names[1]}": pm(other[name]["variance"]),
                   "ms a step": pm(cost[name]["ms"]), f"cost [{cost[name]['cost']['unit']}]": pm(cost[name]["cost"])}
            for name in ESTIMATORS}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("estimator")


def verdict(found: dict[int, dict], cost: dict, documents: int, batch_size: int):
    """Which one to use, a pandas DataFrame with a row for each measured epoch.

    The error of a step of batch_size documents is bias2 + variance, in the time of a step by DisARM. The variance
    falls with the number of documents whose gradients are averaged, the bias does not: averaged over more than "up to"
    documents ZGR is worse than DisARM at equal time. The bias is the enumerated one; that of the other three is 0.
    """
    import pandas as pd
    rows = {}
    for epoch, told in found.items():
        spent = {name: told[name]["variance"]["value"] * cost[name]["cost"]["value"] for name in ESTIMATORS}
        bias2 = told["zgr"]["enumerated"]["value"]
        error = {name: spent[name] * documents / batch_size + bias2 * (name == "zgr") for name in ESTIMATORS}
        limit = max(0.0, spent["disarm"] - spent["zgr"]) * documents / max(bias2, 1e-12)
        rows[epoch] = {f"variance x cost: {name}": round(value / spent["disarm"], 2) for name, value in spent.items()}
        rows[epoch] |= {"bias of zgr [%]": round(100 * bias2 ** 0.5, 2),
                        "least error of a step": min(error, key=error.get),
                        "zgr before disarm up to [documents]": f"{float(f'{limit:.2g}'):,.0f}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epochs")


def recorded(records: list[dict]):
    """The `verdict` at the end of each recorded run, a pandas DataFrame with a row for each."""
    import pandas as pd
    rows = []
    for record in records:
        own = record["parameters"]
        told = {name: {} for name in ESTIMATORS}
        for name, metric in itertools.product(ESTIMATORS, ("variance", "cost", "enumerated")):
            told[name][metric] = record["metrics"].get(f"{metric}_{name}".replace("-", "_"))
        row = verdict({own["epochs"]: told}, told, own["documents"], own["batch_size"]).reset_index()
        rows.append(pd.DataFrame({name: [own[name]] for name in SETTING}).join(row))
    if not rows:
        return pd.DataFrame()
    return pd.concat(rows, ignore_index=True).sort_values(list(SETTING)).set_index("dataset")
