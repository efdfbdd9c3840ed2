"""Symmetric equilibrium learning of the binary HVAE (Flach, Schlesinger, Shekhovtsov, AISTATS 2024), and its baseline.

x: images [B, 1, S, S]; z = (z0, z1): bits [B, n0] and [B, n1] (lib/hvae.py). One gradient step each, nats per image:
    symmetric  p: -log p(x, z), x data, z ~ q(.|x);   then q: -log q(z|x), (x, z) ~ p;   two Adams
    elbo       -E_q log p(x|z1) + KL(q(z|x) || p(z)), gradients through the bits by ZGR, one Adam
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import inception
from lib.classifier import Classifier, cfd, load_or_train, moments
from lib.data import Dataset
from lib.evaluate import estimate, exact, fid, fid_moments
from lib.hvae import CHAIN, ENCODERS, GAUSSIAN, HVAE, build, initialise
from lib.stochastic import bernoulli_entropy, bernoulli_kl, zgr
from lib.train import PRECISIONS, Shuffled, adam, generator, precision

LEARNING = ("symmetric", "elbo")
THRESHOLD = 0.4375                                           # of the binarisation, as in the work
FLIPPED, NOISE, DECAY = 0.001, 0.01, 0.99
CURVES = {"loss per unit or pixel [nats]": {"p_x": "p: x", "p_z1": "p: z1", "q_z0": "q: z0", "q_z1": "q: z1",
                                            "rec": "x", "kl": "KL"},
          "information per unit [bits]": {"mi_p_z1": "z1 under p", "mi_q_z0": "z0 under q", "mi_q_z1": "z1 under q"}}
METRICS = ("cfd_random_code", "cfd_limiting", "fid_random_code", "fid_limiting", "elbo", "mi_q_z0", "mi_q_z1")
LEARNT_FROM = ("dataset", "encoder", "learning", "z0_bits", "z1_bits", "width", "batch_size", "lr", "held_out", "seed",
               "precision")                                  # the notebook's parameters that the weights depend on


# ------------------------------------------------------------------------------------------------ objectives
def p_loss(model: HVAE, x: Tensor, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    """(-log p(z1|z0), -log p(x|z1)) in nats per image, [B] each; -log p(z0) is the constant n0 log 2."""
    return cross_entropy(model.prior(z0), z1), model.nll_x(model.decode(z1), x)


def q_loss(model: HVAE, a: tuple, z0: Tensor, z1: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """(-log q(z0|.), -log q(z1|.)) in nats per image, [B] each; a = encoder(x), prior: logits of p(z1|z0)."""
    logits0, logits1 = model.q_logits(a, z0, z1, prior)
    return cross_entropy(logits0, z0), cross_entropy(logits1, z1)


def elbo_loss(model: HVAE, x: Tensor, drawn: tuple) -> tuple[Tensor, Tensor]:
    """(-log p(x|z1), the KL's part at these bits) in nats per image, [B] each; drawn: of `HVAE.draw_q`.

    Averaged over q they give -ELBO. Analytic are, for the ladder, both KLs; for the reverse encoder, whose q(z0|z1)
    comes after z1, the entropy of q(z1|x) and KL(q(z0|z1) || 1/2), while -log p(z1|z0) is taken at the bits.
    """
    z0, z1, logits0, logits1, prior = drawn
    kl0 = bernoulli_kl(logits0, torch.zeros_like(logits0))
    if model.kind == "ladder":
        return model.nll_x(model.decode(z1), x), kl0 + bernoulli_kl(logits1, prior)
    rest = cross_entropy(model.prior(z0), z1) - bernoulli_entropy(logits1).sum(-1)
    return model.nll_x(model.decode(z1), x), kl0 + rest


def cross_entropy(logits: Tensor, z: Tensor) -> Tensor:
    """-log of independent Bernoullis at bits z: [B, n], [B, n] -> nats [B]. z may carry a gradient (ZGR)."""
    return (F.softplus(logits) - z * logits).sum(-1)


# ------------------------------------------------------------------------------------------------ training
def images(batch: Tensor, gaussian: bool) -> Tensor:
    """uint8 [B, 1, S, S] -> float in [0, 1], binarised at 0.4375 unless gaussian; channels last."""
    x = batch / 255 if gaussian else (batch > THRESHOLD * 255).float()
    return x.contiguous(memory_format=torch.channels_last)


def observed(batch: Tensor, gaussian: bool, generator: torch.Generator) -> Tensor:
    """`images` with the work's noise: N(0, 0.01^2) if gaussian, else each pixel flipped with probability 0.001."""
    x = images(batch, gaussian)
    if gaussian:
        return x + NOISE * torch.randn(x.shape, generator=generator, device=x.device)
    return (x - bernoulli_like(x, FLIPPED, generator)).abs()


def bernoulli_like(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Independent bits of one probability, of x's shape."""
    return torch.empty_like(x).bernoulli_(probability, generator=generator)


def training(model: HVAE, generator: torch.Generator, learning: str = "symmetric", lr: float = 1e-4) -> tuple:
    """The step of one kind of learning and the state it changes: (step, {name: item}) for `train.fit`.

    The step takes uint8 images [B, 1, S, S] and returns loss (nats per image), losses per unit or pixel (nats), the
    mean mutual information per unit (bits) and, if gaussian, sigma. Raises ValueError: unknown learning, lr <= 0.
    """
    if learning not in LEARNING:
        raise ValueError(f"unknown learning {learning!r}: use {' or '.join(LEARNING)}")
    if lr <= 0:
        raise ValueError(f"the learning rate must be positive, got {lr}")
    model.train().to(memory_format=torch.channels_last)
    state = {"model": model, "generator": generator}
    if learning == "elbo":
        state["optimizer"] = adam(model.parameters(), lr)
        return _elbo_step(model, state["optimizer"], generator), state
    state |= {"p_optimizer": adam(model.generative(), lr), "q_optimizer": adam(model.encoder.parameters(), lr)}
    return _symmetric_step(model, state["p_optimizer"], state["q_optimizer"], generator), state


def replica(parameters: dict, data: Tensor, device: torch.device, folder: Path | None = None) -> dict:
    """One seed's arguments for `train.fit_together`, from the notebook's parameters; data: uint8 [N, 1, 28, 28].

    The model is in state["model"]. Raises ValueError: an unknown encoder or learning, no bits, lr <= 0.
    """
    bits, seed = (parameters["z0_bits"], parameters["z1_bits"]), parameters["seed"]
    model = build(parameters["dataset"], parameters["encoder"], bits, parameters["width"])
    model = initialise(model, generator(seed, use="weights")).to(device)
    step, state = training(model, generator(seed, device), parameters["learning"], parameters["lr"])
    if parameters["compiled"]:
        model.encoder.trunk.compile()
        model.decoder.compile()
    return {"step": step, "batches": Shuffled(data.to(device), parameters["batch_size"], seed), "state": state,
            "config": {name: parameters[name] for name in LEARNT_FROM}, "folder": folder, "title": f"seed {seed}"}


def _symmetric_step(model: HVAE, p_optimizer, q_optimizer, generator: torch.Generator):
    """p-step and q-step. The pass that draws from q (and from p) serves the statistics and the chain as well."""
    def step(batch: Tensor) -> dict[str, Tensor]:
        x = observed(batch, model.gaussian, generator)
        n, pixels = len(x), x[0].numel()
        with torch.no_grad():
            z0, z1, logits0, logits1, _ = model.draw_q(model.encoder(torch.cat([x, model.chain])), generator)
            _track(model, "q_z0", logits0[:n])
            _track(model, "q_z1", logits1[:n])
        p_optimizer.zero_grad()
        p_z1, p_x = (loss.mean() for loss in p_loss(model, x, z0[:n], z1[:n]))
        (p_z1 + p_x).backward()
        p_optimizer.step()

        with torch.no_grad():
            own_z0, own_z1, prior = model.draw_z(n, generator)
            _track(model, "p_z1", prior)
            own_x, chain = model.draw_x(model.decode(torch.cat([own_z1, z1[n:]])), generator).split([n, CHAIN])
            model.chain.copy_(chain)
        q_optimizer.zero_grad()
        q_z0, q_z1 = (loss.mean() for loss in q_loss(model, model.encoder(own_x), own_z0, own_z1, prior))
        (q_z0 + q_z1).backward()
        q_optimizer.step()
        losses = {"loss": p_z1 + p_x, "p_x": p_x / pixels, "p_z1": p_z1 / model.bits[1], "q_z0": q_z0 / model.bits[0],
                  "q_z1": q_z1 / model.bits[1]}
        return losses | _tracked(model)

    return step


def _elbo_step(model: HVAE, optimizer, generator: torch.Generator):
    """One step on -ELBO. p(z1|z0), part of the ladder's posterior, gets that gradient too, as in the work's code."""
    def step(batch: Tensor) -> dict[str, Tensor]:
        x = observed(batch, model.gaussian, generator)
        optimizer.zero_grad()
        drawn = model.draw_q(model.encoder(x), generator, zgr)
        rec, kl = (loss.mean() for loss in elbo_loss(model, x, drawn))
        (rec + kl).backward()
        optimizer.step()
        with torch.no_grad():
            _track(model, "q_z0", drawn[2])
            _track(model, "q_z1", drawn[3])
            _track(model, "p_z1", model.draw_z(len(x), generator)[2])
            model.chain.copy_(sweep(model, model.chain, generator))
        return {"loss": rec + kl, "rec": rec / x[0].numel(), "kl": kl / sum(model.bits)} | _tracked(model)

    return step


def _track(model: HVAE, name: str, logits: Tensor) -> None:
    """Running statistics of the bits `name` from their logits [B, n]: mean probability, mutual information in bits."""
    mean, mi = getattr(model, f"mean_{name}"), getattr(model, f"mi_{name}")
    mean.lerp_(logits.sigmoid().mean(0), 1 - DECAY)
    marginal = bernoulli_entropy(torch.logit(mean, eps=1e-6))
    mi.lerp_((marginal - bernoulli_entropy(logits).mean(0)) / math.log(2), 1 - DECAY)


def _tracked(model: HVAE) -> dict[str, Tensor]:
    means = {f"mi_{name}": getattr(model, f"mi_{name}").mean() for name in ("p_z1", "q_z0", "q_z1")}
    return means | ({"sigma": model.log_sigma.detach().exp()} if model.gaussian else {})


# ------------------------------------------------------------------------------------------------ generation
@torch.no_grad()
def sweep(model: HVAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """One step of the chain x -> z ~ q(.|x) -> x ~ p(.|z), images [B, 1, S, S]."""
    return model.draw_x(model.decode(model.draw_q(model.encoder(x), generator)[1]), generator)


@torch.no_grad()
def random_code(model: HVAE, n: int, generator: torch.Generator, hard: bool = True) -> Tensor:
    """n images [n, 1, S, S] in [0, 1] from random codes: z0 uniform, z1 ~ p(.|z0), the decoder's `picture`."""
    with precision("fp32", model.chain.device):
        parts = [model.picture(model.decode(model.draw_z(size, generator)[1]), hard)
                 for size in _sizes(n, generator.device)]
    return torch.cat(parts)


@torch.no_grad()
def limiting(model: HVAE, n: int, sweeps: list[int], generator: torch.Generator,
             hard: bool = True) -> dict[int, Tensor]:
    """uint8 images [n, 1, S, S] after each of the given numbers of sweeps, seen through one more encode-decode.

    The chain starts at images of the model, or at random bits if gaussian, as the work's does. ValueError: no sweeps.
    """
    if not sweeps or min(sweeps) < 0:
        raise ValueError(f"give at least one number of sweeps, none negative, got {sweeps}")
    found = {k: [] for k in sorted(set(sweeps))}
    with precision("fp32", model.chain.device):
        for size in _sizes(n, generator.device):
            x = _start(model, size, generator)
            for k in range(max(sweeps) + 1):
                output = model.decode(model.draw_q(model.encoder(x), generator)[1])
                if k in found:
                    found[k].append(as_bytes(model.picture(output, hard)))
                x = model.draw_x(output, generator)
    return {k: torch.cat(parts) for k, parts in found.items()}


def _start(model: HVAE, n: int, generator: torch.Generator) -> Tensor:
    if not model.gaussian:
        return model.draw_x(model.decode(model.draw_z(n, generator)[1]), generator)
    return torch.empty(n, *model.chain.shape[1:], device=model.chain.device).bernoulli_(0.5, generator=generator)


def _sizes(n: int, device: torch.device) -> list[int]:
    size = 10_000 if device.type == "cuda" else 500
    return [size] * (n // size) + [n % size] * (n % size > 0)


def milestones(sweeps: int) -> list[int]:
    """Where the way to the limiting distribution is looked at: 0, 1, 2, 5, 10, ... and the last of `sweeps`."""
    return [k for k in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500) if k < sweeps] + [sweeps]


@torch.no_grad()
def reconstruct(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [n, 1, S, S] -> [n, 2, 1, S, S] in [0, 1]: what the model sees of each image beside one reconstruction."""
    x = images(batch, model.gaussian)
    with precision("fp32", x.device):
        output = model.decode(model.draw_q(model.encoder(x), generator)[1])
    return torch.stack([x, model.picture(output, hard=False)], 1)


def as_bytes(pictures: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, as they are saved in a file."""
    return (255 * pictures).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(model: HVAE, data: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """elbo, rec = log p(x|z1) and kl of uint8 images [N, 1, S, S], without the training's noise: nats, [N] each.

    One draw of z an image; a density over [0, 1]^pixels if gaussian, else a probability of the binarised image.
    """
    found = []
    for part in data.split(500):
        x = images(part, model.gaussian)
        with precision("fp32", x.device):
            found.append(torch.stack(elbo_loss(model, x, model.draw_q(model.encoder(x), generator))))
    nll, kl = torch.cat(found, 1)
    return {"elbo": -nll - kl, "rec": -nll, "kl": kl}


def split(data: Dataset, held_out: bool) -> tuple[Tensor, Tensor]:
    """(images to learn from, images to compare with), uint8: all 70,000 both times, or training and test images."""
    if held_out:
        return data.train, data.test
    return (torch.cat([data.train, data.test]),) * 2


def check(parameters: dict, image: Tensor) -> None:
    """Raise ValueError, before any work is done, on a value of the notebook's parameters that must fail later.

    image: one image of the data set, [1, 28, 28].
    """
    if tuple(image.shape) != (1, 28, 28):
        raise ValueError(f"the networks are for grey images of 28x28 pixels, {parameters['dataset']} has "
                         f"{' x '.join(map(str, image.shape))}: use mnist, fashionmnist or digits")
    for name, known in (("encoder", ENCODERS), ("learning", LEARNING), ("precision", PRECISIONS)):
        if parameters[name] not in known:
            raise ValueError(f"unknown {name} {parameters[name]!r}: use {', '.join(known)}")
    for name, least in (("z0_bits", 1), ("z1_bits", 1), ("width", 1), ("steps", 0), ("batch_size", 1), ("log_every", 0),
                        ("n_generated", 2), ("sweeps", 0), ("replicas", 1)):
        if parameters[name] < least:
            raise ValueError(f"{name} must be at least {least}, got {parameters[name]}")
    if parameters["lr"] <= 0:
        raise ValueError(f"the learning rate must be positive, got {parameters['lr']}")


def judge(data: Dataset, device: torch.device, with_fid: bool = False) -> Classifier:
    """The data set's classifier, whose features the CFD compares: of binarised images unless the model is Gaussian.

    with_fid: also see to it, before anything is trained, that the FID's weights are here and sound; DataError if not.
    """
    if with_fid:
        inception.load("cpu")
    return load_or_train(data, None if data.name in GAUSSIAN else THRESHOLD, device=device)


def known(reference: Tensor, data: Dataset, net: Classifier, device: torch.device, with_fid: bool = False) -> dict:
    """What generated images are compared with: "images" as the model sees them, moments "cfd" and, if asked, "fid"."""
    seen = torch.cat([as_bytes(images(part, data.name in GAUSSIAN)) for part in reference.split(5000)])
    return {"images": seen, "cfd": moments(net, seen)} | ({"fid": fid_moments(seen, device)} if with_fid else {})


def measure(model: HVAE, data: Dataset, reference: dict, net: Classifier, n: int, sweeps: int,
            generator: torch.Generator) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """(metrics, images uint8 [n, 1, S, S] "random_code" and "limiting", bits' information) of one model.

    reference: of `known`. elbo, rec, kl and mi_* (summed over bits) of the test images; CFD, and FID if its moments are
    given, of n images from random codes and after `sweeps` sweeps; cfd_after_k: after k = 0, 1, 2, 5, ... of them.
    """
    device = generator.device
    test = data.test.to(device)
    terms, told = evaluate(model, test, generator), information(model, test, generator)
    metrics = {name: estimate(values, "nats per image") for name, values in terms.items()}
    metrics |= {f"mi_{name}": exact(values.sum(), "bits") for name, values in told.items()}
    metrics["classifier_accuracy"] = net.recipe["accuracy"]
    own, after = as_bytes(random_code(model, n, generator)), limiting(model, n, milestones(sweeps), generator)
    generated = {"random_code": own, "limiting": after[sweeps]}
    metrics |= {f"cfd_{name}": cfd(net, pictures, reference["cfd"]) for name, pictures in generated.items()}
    metrics |= {f"cfd_after_{k}": cfd(net, after[k], reference["cfd"]) for k in milestones(sweeps)[:-1]}
    if "fid" in reference:
        metrics |= {f"fid_{name}": fid(pictures, reference["fid"], device) for name, pictures in generated.items()}
    return metrics, generated, told


def sweeps_of(found: list[dict]) -> dict[str, dict[int, dict]]:
    """Of run records: name -> {sweeps: CFD}, as `plots.by_sweeps` draws them; of several seeds mean and standard error.

    Only the runs of the largest size (by gradient steps times batch) of each setting.
    """
    settings: dict[str, dict[int, list[dict]]] = {}
    for record in found:
        own = record["parameters"]
        name = ", ".join([own["dataset"], own["encoder"], own["learning"], *["held out"] * own["held_out"],
                          *["bf16"] * (own["precision"] == "bf16")])
        settings.setdefault(name, {}).setdefault(own["steps"] * own["batch_size"], []).append(record)
    curves = {}
    for name, sizes in settings.items():
        largest, values = sizes[max(sizes)], {}
        for record in largest:
            last = {f"cfd_after_{record['parameters']['sweeps']}": record["metrics"]["cfd_limiting"]}
            for key, metric in (record["metrics"] | last).items():
                if key.startswith("cfd_after_"):
                    values.setdefault(int(key.removeprefix("cfd_after_")), []).append(metric)
        curves[name] = {k: m[0] if len(m) == 1 else estimate(torch.tensor([one["value"] for one in m]), "CFD")
                        for k, m in values.items()}
    return curves


@torch.no_grad()
def information(model: HVAE, data: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Mutual information in bits of each bit with what its layer depends on, over the images data: uint8 [N, 1, S, S].

    q_z0 [n0], q_z1 [n1]: under q, each layer with what q conditions it on; p_z1 [n1]: z1 with z0 under p, of N draws.
    The work's estimate, H(mean p) - mean H(p), at the final weights: the running one of the curves lags behind.
    """
    found: dict[str, list[Tensor]] = {"p_z1": [], "q_z0": [], "q_z1": []}
    for part in data.split(500):
        with precision("fp32", data.device):
            _, _, q_z0, q_z1, _ = model.draw_q(model.encoder(images(part, model.gaussian)), generator)
            own = {"p_z1": model.draw_z(len(part), generator)[2], "q_z0": q_z0, "q_z1": q_z1}
        for name, logits in own.items():
            found[name].append(logits.double())
    return {name: (bernoulli_entropy(torch.logit(torch.cat(parts).sigmoid().mean(0), eps=1e-9))
                   - bernoulli_entropy(torch.cat(parts)).mean(0)) / math.log(2) for name, parts in found.items()}
