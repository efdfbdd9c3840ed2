"""Semantic hashing: a VAE of b independent bits for documents (Shekhovtsov, Schlesinger, Flach, ICLR 2022, section 5).

x = c + s: word counts of a document plus the smoothing vector (lib/bags.py), f = x / |x|; z: b bits, uniform a priori.
    nelbo = sum_w x_w log(f_w / p_w(z)) + KL(q(z|x) || p(z)),  z ~ q(.|x),  nats per document
It is offset by the document's own entropy: not the NLL of a multinomial and no perplexity, which are given beside it.
"""
import contextlib
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lib import root
from lib.bags import Corpus, cross_entropy
from lib.checkpoint import TrainError, find, read_meta
from lib.documents import Documents, smoothing
from lib.evaluate import estimate, exact
from lib.runs import presets
from lib.search import correlations, entropies
from lib.stochastic import (
    ESTIMATORS,
    antithetic,
    arm,
    bernoulli,
    bernoulli_kl,
    disarm,
    reinforce_loo,
    zgr,
)
from lib.train import PRECISIONS, Items, adam, fit_together, generator, precision

ENCODERS = {"e1": ("counts", False), "e2": ("frequencies", True), "e3": ("frequencies", False)}  # reads, has a layer
INPUTS = ("counts", "frequencies")
KL = ("sampled", "analytic")
BATCHED = 256                                                # documents of an evaluation's batch in the work's code
CURVES = ({"NELBO [nats per document]": {"loss": "training", "test_nelbo": "test"},
           "perplexity per word": {"perplexity": "training", "test_perplexity": "test"}},
          {"NLL [nats per word]": {"nll_per_word": "training", "test_nll_per_word": "test"},
           "KL [nats per document]": {"kl": "training", "test_kl": "test"},
           "test codes": {"bit_entropy": "bit entropy [bits]", "bit_correlation": "|correlation|"}})
METRICS = {"test_nelbo_min_as_published": "test, as published", "test_nelbo_min": "test, min",
           "test_nelbo_validated": "validated", "test_nelbo_last": "last", "best_epoch": "best epoch",
           "train_nelbo_final": "train, last", "test_perplexity": "perplexity", "precision_at_100": "prec@100"}
LEARNT_FROM = ("dataset", "encoder", "input", "bits", "decoder_depth", "hidden", "estimator", "kl", "batch_size", "lr",
               "seed", "precision")                          # the notebook's parameters that the weights depend on


# ------------------------------------------------------------------------------------------------ the model
class WordLinear(nn.Module):
    """Linear layer from x or its frequencies to n units; weight [V, n], so that a word's weights are a row."""

    def __init__(self, words: int, n: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(words, n)), nn.Parameter(torch.empty(n))

    def forward(self, bag, frequencies: bool) -> Tensor:
        """[B, n] of a bag of B documents."""
        x = bag.project(self.weight)
        return (x / bag.total[:, None] if frequencies else x) + self.bias


class SemanticHashing(nn.Module):
    """q(z|x) and p(x|z) for V words and b bits; encoder: of ENCODERS; decoder of `depth` hidden layers.

    reads: what the encoder is given, counts or frequencies; "": as its kind says.
    """

    def __init__(self, words: int, bits: int, encoder: str = "e1", depth: int = 0, hidden: int = 512, reads: str = ""):
        super().__init__()
        kind_reads, layered = ENCODERS[encoder]
        self.bits, self.reads = bits, reads or kind_reads
        self.words_in = WordLinear(words, hidden if layered else bits)
        self.code = nn.Sequential(nn.LeakyReLU(), nn.Linear(hidden, bits)) if layered else nn.Identity()
        sizes = [bits] + [hidden] * depth
        self.hidden = nn.Sequential(*(layer for a, b in zip(sizes, sizes[1:], strict=False)
                                      for layer in (nn.Linear(a, b), nn.LeakyReLU())))
        self.words_out = nn.Linear(sizes[-1], words)

    def encode(self, bag, reads: str = "") -> Tensor:
        """Logits [B, b] of q(z|x); reads: what the encoder is given instead of what it has learnt from."""
        logits = self.code(self.words_in(bag, (reads or self.reads) == "frequencies"))
        return logits.to(self.words_in.weight.dtype)

    def nll(self, z: Tensor, bag, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of scale * -x.log p, -c.log p, -s.log p) of bits z [S, B, b]: see `bags.cross_entropy`."""
        return cross_entropy(self.hidden(z), self.words_out.weight, self.words_out.bias, bag, scale)


@torch.no_grad()
def initialise(model: SemanticHashing, generator: torch.Generator) -> SemanticHashing:
    """PyTorch's default of linear layers, uniform in +-1/sqrt(inputs), from the generator; in place."""
    for layer in model.modules():
        if isinstance(layer, WordLinear | nn.Linear):
            inputs = layer.weight.shape[0 if isinstance(layer, WordLinear) else 1]
            for parameter in (layer.weight, layer.bias):
                parameter.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return model


# ------------------------------------------------------------------------------------------------ training
def gradient(model: SemanticHashing, bag, code: Tensor, scale: Tensor, estimator: str, kl: str,
             generator: torch.Generator, estimates: int = 1) -> Tensor:
    """Estimates of the gradient of sum_B scale * nelbo: their mean joins the decoder's gradients and code.grad.

    code: logits [B, b], a leaf; scale [B]. Returns -c.log p and -x.log p of the samples, nats [2, S, B]. With
    kl = "sampled" log q(z|x) is part of what the estimator sees, as in DisARM's and the work's code. ZGR, which goes
    through the decoder instead, takes the analytic KL whatever `kl`, and one sample an estimate; the others take two.
    """
    logits, u = code.detach(), []
    if estimator == "zgr":
        drawn = [zgr(code, generator) for _ in range(estimates)]
    elif estimator == "reinforce-loo":
        drawn = [bernoulli(logits, generator) for _ in range(2 * estimates)]
    else:
        *pairs, u = zip(*(antithetic(logits, generator) for _ in range(estimates)), strict=True)
        drawn = [z for pair in zip(*pairs, strict=True) for z in pair]
    drawn = torch.stack(drawn)
    loss, counted, smooth = model.nll(drawn, bag, scale / len(drawn))
    loss.backward()
    f = counted + smooth
    if kl == "analytic" or estimator == "zgr":
        (bernoulli_kl(code, torch.zeros_like(code)) * scale).sum().backward()
    else:
        f = f + (drawn * logits - nn.functional.softplus(logits)).sum(-1)      # + log q(z|x)
    if estimator != "zgr":
        z, other, f, f_other = drawn[::2], drawn[1::2], f[::2], f[1::2]
        found = {"disarm": lambda: disarm(logits, z, other, f, f_other), "arm": lambda: arm(torch.stack(u), f, f_other),
                 "reinforce-loo": lambda: reinforce_loo(logits, z, other, f, f_other)}[estimator]()
        found = found.mean(0) * scale[:, None]
        code.grad = found if code.grad is None else code.grad + found
    return torch.stack([counted, counted + smooth])


def training(model: SemanticHashing, corpus: Corpus, generator: torch.Generator, optimizer, *,
             estimator: str = "disarm", kl: str = "sampled", estimates: int = 1, size: int = 256):
    """The step for `train.fit` on batches of item numbers [size] (train.Items): averages `estimates` estimates.

    It returns loss = nelbo, kl (nats per document) and nll_per_word (-c.log p, nats per word), so scaled that their
    means over the steps of an epoch are those over all documents, or words, at the weights of the moment.
    Raises ValueError: unknown estimator or kl, no estimate.
    """
    for name, value, known in (("estimator", estimator, ESTIMATORS), ("kl", kl, KL)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use {', '.join(known)}")
    if estimates < 1:
        raise ValueError(f"the gradient needs at least one estimate, got {estimates}")
    per_epoch = -(-len(corpus) // size)
    per_document, per_word = per_epoch / len(corpus), per_epoch / corpus.words

    def step(items: Tensor) -> dict[str, Tensor]:
        bag, present = corpus.batch(items), (items >= 0).float()
        optimizer.zero_grad()
        logits = model.encode(bag)
        code, scale = logits.detach().requires_grad_(), present / present.sum()
        counted, nll = gradient(model, bag, code, scale, estimator, kl, generator, estimates).mean(1)
        logits.backward(code.grad)
        optimizer.step()
        kl_now = bernoulli_kl(logits.detach(), torch.zeros_like(code))
        return {"loss": ((nll + bag.offset + kl_now) * present).sum() * per_document,
                "kl": (kl_now * present).sum() * per_document, "nll_per_word": (counted * present).sum() * per_word}

    return step


def check(parameters: dict) -> None:
    """Raise ValueError, before any work is done, on a value of the notebook's parameters that must fail later."""
    for name, known in (("encoder", ENCODERS), ("input", ("", *INPUTS)), ("estimator", ESTIMATORS), ("kl", KL),
                        ("precision", PRECISIONS)):
        if parameters[name] not in known:
            raise ValueError(f"unknown {name} {parameters[name]!r}: use {', '.join(filter(None, known))}")
    for name, least in (("bits", 1), ("decoder_depth", 0), ("hidden", 1), ("epochs", 0), ("finetune_epochs", 0),
                        ("finetune_estimates", 1), ("batch_size", 1), ("replicas", 1)):
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")
    if parameters["bits"] > 255:
        raise ValueError(f"bits must be at most 255, which is what the search holds, got {parameters['bits']}")
    if not parameters["epochs"] + parameters["finetune_epochs"]:
        raise ValueError("there is nothing to train: epochs and finetune_epochs are both 0")
    if parameters["lr"] <= 0:
        raise ValueError(f"the learning rate must be positive, got {parameters['lr']}")


def corpora(documents: Documents, device: torch.device) -> tuple[Corpus, Corpus]:
    """Training and test documents, both smoothed by the training documents' distribution, on the device."""
    s = smoothing(documents.train)
    return Corpus(documents.train, s, device, dense=device.type == "cuda"), Corpus(documents.test, s, device)


def replica(parameters: dict, train: Corpus, test: Corpus, device: torch.device, folder: Path | None = None) -> dict:
    """One seed's model, optimizer and noise, and where its checkpoints go: what `learn` trains.

    Raises ValueError: no document of a corpus has a word.
    """
    for name, corpus in (("training", train), ("test", test)):
        if not corpus.words:
            raise ValueError(f"no {name} document has a word of the vocabulary: look at the data")
    seed = parameters["seed"]
    model = SemanticHashing(len(train.smoothing), parameters["bits"], parameters["encoder"],
                            parameters["decoder_depth"], parameters["hidden"], parameters["input"])
    model = initialise(model, generator(seed, use="weights")).to(device)
    state = {"model": model, "optimizer": adam(model.parameters(), parameters["lr"]),
             "generator": generator(seed, device), "test_generator": generator(seed, device, "test")}
    return {"parameters": parameters, "train": train, "test": test, "state": state, "folder": folder}


def learn(replicas: list[dict], resume: str = "", **options) -> list[dict[str, list]]:
    """Train: `epochs` of one estimate a step, then `finetune_epochs` of `finetune_estimates`; the history of each.

    replicas: of `replica`, alike in all but their seeds. The history has a point per epoch: the metrics of `training`
    and `look`, and from them the perplexities, exp of (-c.log p + KL) per word, upper bounds. resume, options: of
    `train.fit_together`, whose errors it raises; the fine-tuning has its own checkpoints.
    """
    _check_stages(replicas, resume)
    own = replicas[0]["parameters"]
    stages = [("", own["epochs"], 1)]
    if own["finetune_epochs"]:
        stages.append(("finetuning", own["finetune_epochs"], own["finetune_estimates"]))
    histories = [{} for _ in replicas]
    for stage, epochs, estimates in stages:
        jobs = [job(one, stage, estimates) for one in replicas]
        per_epoch, begun = jobs[0]["batches"].per_epoch, histories[0].get("epoch", [0])[-1:] or [0]
        found = fit_together(jobs, steps=epochs * per_epoch, log_every=per_epoch, numerics=own["precision"],
                             checkpoint_every=per_epoch * max(1, min(20, epochs)),
                             resume=_stage_resume(resume, stage), **options)
        for whole, part in zip(histories, found, strict=True):
            part["epoch"] = [begun[0] + step // per_epoch for step in part.pop("step")]
            for name, values in part.items():
                whole.setdefault(name, []).extend(values)
    for one, history in zip(replicas, histories, strict=True):
        for corpus, kind in ((one["train"], ""), (one["test"], "test_")):
            terms = zip(history.get(f"{kind}nll_per_word", []), history.get(f"{kind}kl", []), strict=True)
            nats = [nll + kl * len(corpus) / corpus.words for nll, kl in terms]
            history[f"{kind}perplexity"] = [_perplexity(value) for value in nats]
    return histories


def job(one: dict, stage: str = "", estimates: int = 1) -> dict:
    """The arguments of `train.fit` for one of `replica`; stage: "" or the name of a later one, such as "finetuning"."""
    own, state, train, test = one["parameters"], one["state"], one["train"], one["test"]
    step = training(state["model"], train, state["generator"], state["optimizer"], estimator=own["estimator"],
                    kl=own["kl"], estimates=estimates, size=own["batch_size"])
    config = {name: own[name] for name in LEARNT_FROM}
    if stage:
        config |= {"epochs": own["epochs"], "finetune_estimates": estimates}
    return {"step": step, "state": state, "config": config, "folder": one["folder"] and one["folder"] / stage,
            "batches": Items(len(train), own["batch_size"], f"{own['seed']} {stage}".strip(), train.device),
            "look": lambda: look(state["model"], test, state["test_generator"]),
            "title": f"seed {own['seed']} {stage}".strip()}


def _check_stages(replicas: list[dict], resume: str) -> None:
    """Refuse at once what would go wrong later: a checkpoint of another stage, a fine-tuning that began elsewhere."""
    for one in replicas:
        for stage in ("", "finetuning"):
            path, config = find(_stage_resume(resume, stage), one["folder"] and one["folder"] / stage), {}
            with contextlib.suppress(SafetensorError, ValueError):             # a corrupt file: `fit_together` says so
                config = read_meta(path)["config"] if path else {}
            if not stage and "finetune_estimates" in config:
                raise TrainError(f"{path} is of a fine-tuning: resume from its run's folder, {path.parents[1]}")
            if stage and config.get("epochs", one["parameters"]["epochs"]) != one["parameters"]["epochs"]:
                raise TrainError(f"{path} began after {config['epochs']} epochs, this run has "
                                 f"{one['parameters']['epochs']}: to fine-tune anew resume from "
                                 f"{path.parents[1] / 'latest.safetensors'}")


def _stage_resume(resume: str, stage: str) -> str:
    """What `resume` means for the fine-tuning: of a run folder its own checkpoint there, if it has got so far."""
    if not stage or resume in ("", "auto"):
        return resume
    if resume in ("latest", "best"):
        return "auto"
    folder = root() / Path(resume).expanduser() / stage
    return str(folder) if (folder / "latest.safetensors").is_file() else ""


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(model: SemanticHashing, corpus: Corpus, generator: torch.Generator, reads: str = "") -> dict[str, Tensor]:
    """nelbo, nll = -c.log p and kl in nats per document [N], one draw of z a document; logits [N, b] of q(z|x).

    reads: what the encoder is given instead of what it has learnt from (known fault 1). Always in float32.
    """
    found = []
    with precision("fp32", corpus.device):
        for bag in corpus.bags():
            logits = model.encode(bag, reads)
            z = bernoulli(logits, generator)[None]
            _, (counted,), (smooth,) = model.nll(z, bag, torch.ones_like(bag.total))
            kl = bernoulli_kl(logits, torch.zeros_like(logits))
            found.append((counted + smooth + bag.offset + kl, counted, kl, logits))
    return dict(zip(("nelbo", "nll", "kl", "logits"), map(torch.cat, zip(*found, strict=True)), strict=True))


@torch.no_grad()
def codes(model: SemanticHashing, smoothing: Tensor, counts: Tensor) -> Tensor:
    """The most probable bits, bool [N, b], of documents given as counts, sparse CSR [N, V]; smoothing [V]."""
    corpus = Corpus(counts, smoothing, smoothing.device)
    with precision("fp32", smoothing.device):
        return torch.cat([model.encode(bag) > 0 for bag in corpus.bags()])


def look(model: SemanticHashing, test: Corpus, generator: torch.Generator) -> dict[str, Tensor]:
    """What is followed from epoch to epoch on the test documents, 0-d tensors.

    test_nelbo, its means over the two halves of the documents (even and odd numbers), and as the work's code computes
    it (`as_published`: an encoder that has learnt from frequencies is given counts, known fault 1, and the means of
    batches of 256 are averaged, the last with 81 documents counting as much as the others),
    KL, nats per word, mean entropy of a bit of the codes over documents in bits, mean absolute correlation of two bits.
    """
    seen = evaluate(model, test, generator)
    nelbo, bits = seen["nelbo"].double(), seen["logits"] > 0
    published = nelbo if model.reads == "counts" else evaluate(model, test, generator, "counts")["nelbo"].double()
    alike = correlations(bits).abs().fill_diagonal_(0).sum() / max(1, model.bits * (model.bits - 1))
    return {"test_nelbo": nelbo.mean(), "test_nelbo_even": nelbo[::2].mean(),
            "test_nelbo_odd": nelbo[1::2].mean(),
            "test_nelbo_as_published": torch.stack([part.mean() for part in published.split(BATCHED)]).mean(),
            "test_kl": seen["kl"].mean(), "test_nll_per_word": seen["nll"].double().sum() / test.words,
            "bit_entropy": entropies(bits).mean().to(nelbo.device), "bit_correlation": alike.to(nelbo.device)}


def measure(model: SemanticHashing, train: Corpus, test: Corpus, history: dict, generator: torch.Generator) -> dict:
    """The metrics of a run; NELBOs in nats per document.

    test_nelbo_min: the smallest of all epochs, at `best_epoch`, so chosen on the test documents (known fault 2);
    _as_published: the smallest as the work's code evaluates (see `look`); _validated: of the epoch that is best on one
    half of the test documents, measured on the other, both ways, averaged; _last: of the last epoch. train_nelbo_final:
    of the training documents at the end. Their `se` is that of drawing z, by two draws a document at the end, the
    encoder given what it has learnt from: all runs share the documents, over which a NELBO's error is
    test_document_error. perplexity: exp of (-c.log p + KL) per word, an upper bound.
    """
    metrics, errors = {}, {}
    for name, corpus in (("train", train), ("test", test)):
        one, other = (evaluate(model, corpus, generator) for _ in range(2))
        nelbo, difference = (one["nelbo"] + other["nelbo"]).double() / 2, (one["nelbo"] - other["nelbo"]).double()
        errors[name] = (difference.square().sum() / 2).sqrt().item() / len(corpus)
        if name == "train":
            metrics["train_nelbo_final"] = _metric(nelbo.mean().item(), errors["train"] / math.sqrt(2), len(corpus))
        else:
            metrics["test_document_error"] = exact(nelbo.std() / math.sqrt(len(corpus)), "nats per document")
        nll = (one["nll"] + other["nll"]).double().sum() / 2
        metrics |= {f"{name}_kl": estimate(one["kl"], "nats per document"),
                    f"{name}_nll_per_word": exact(nll / corpus.words, "nats per word"),
                    f"{name}_perplexity": exact(_perplexity((nll + one["kl"].sum()).item() / corpus.words), "words")}
    if "test_nelbo" in history:
        found = {name: _metric(value, errors["test"], len(test)) for name, value in chosen(history).items()}
        metrics = found | {"best_epoch": exact(history["epoch"][_best(history["test_nelbo"])], "epochs")} | metrics
    return metrics


def _perplexity(nats_per_word: float) -> float:
    return math.exp(min(nats_per_word, 700.0))                  # beyond that no float holds it


def chosen(history: dict) -> dict[str, float]:
    """test_nelbo_min, _min_as_published, _validated and _last of a history: see `measure`."""
    whole, even, odd = (history[name] for name in ("test_nelbo", "test_nelbo_even", "test_nelbo_odd"))
    return {"test_nelbo_min": min(whole), "test_nelbo_min_as_published": min(history["test_nelbo_as_published"]),
            "test_nelbo_validated": (odd[_best(even)] + even[_best(odd)]) / 2, "test_nelbo_last": whole[-1]}


def _best(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _metric(value: float, se: float, n: int) -> dict:
    return {"value": value, "se": se, "n": n, "unit": "nats per document"}


def grid(records: list[dict], metric: str) -> dict:
    """{decoder depth: {encoder: {bits: {epochs of all stages: metric}}}} of run records, as `plots_bits.hashing` draws.

    Of the work's own setting only: DisARM, the encoders' own inputs, and the preset `paper` but for the lengths; not in
    bf16. Over seeds the mean with its standard error.
    """
    own = presets("semantic-hashing")["paper"] | {"input": "", "estimator": "disarm", "kl": "sampled"}
    own = {name: value for name, value in own.items() if name not in ("epochs", "finetune_epochs")}
    cells: dict = {}
    for record in records:
        given = record["parameters"]
        if given["precision"] != "bf16" and all(given[name] == value for name, value in own.items()):
            cell = cells.setdefault(given["decoder_depth"], {}).setdefault(given["encoder"], {})
            epochs = given["epochs"] + given["finetune_epochs"]
            cell.setdefault(given["bits"], {}).setdefault(epochs, {})[given["seed"]] = record["metrics"][metric]
    return {depth: {encoder: {bits: {epochs: _over_seeds(list(seeds.values())) for epochs, seeds in found.items()}
                              for bits, found in row.items()} for encoder, row in rows.items()}
            for depth, rows in cells.items()}


def _over_seeds(metrics: list[dict]) -> dict:
    if len(metrics) == 1:
        return metrics[0]
    return estimate(torch.tensor([metric["value"] for metric in metrics]), metrics[0]["unit"])


def thinned(history: dict[str, list], points: int = 300) -> dict[str, list]:
    """A history of at most about so many points, its values to six digits, for a run record; the last point is kept."""
    n = len(history.get("epoch", []))
    keep = sorted({*range(0, n, -(-n // points) or 1), n - 1} - {-1})
    return {name: [float(f"{values[i]:.6g}") for i in keep] for name, values in history.items()}
