"""VAE and two-layer HVAE whose prior is a mixture of variational posteriors (Tomczak & Welling 2018), and its rivals.

Every prior of z2 is an equal mixture of K diagonal Gaussians:
    standard   one component, N(0, I)
    vamp       q(z2|u_k), k = 1 .. K, at learned pseudo-inputs u_k (the VampPrior)
    vamp-data  q(z2|x_k) at K fixed training images
    mog        K Gaussians learned freely
and the objective is the ELBO with every term at a draw of the codes, nats per image:
    log p(x|z2, z1) - [log q(z2|x) - log p(z2)] - [log q(z1|x, z2) - log p(z1|z2)]      (the VAE has no z1)

lib/vampport.py and lib/vamplikelihood.py hold the two experiments on it.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib import vampnets
from lib.stochastic import bernoulli_log_prob, diagonal_log_prob, mixture_log_prob, reparameterise
from lib.train import adam, precision

PRIORS = ("standard", "vamp", "vamp-data", "mog")
HALF_GREY = 0.5 / 255                                    # so far inside [0, 1] clipping has a slope
FLOOR = 1e-7                                             # under a gradient's norm, as in the paper's code


# ------------------------------------------------------------------------------------------------ priors
class Standard(nn.Module):
    """N(0, I): a mixture of one."""

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, d))

    def forward(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Means and log variances of the components, [1, d] each."""
        return self.zero, self.zero


class Mog(nn.Module):
    """K Gaussians: means drawn from N(0, I), variances 1 at first and limited as the posterior's."""

    def __init__(self, k: int, d: int, generator: torch.Generator):
        super().__init__()
        self.means = nn.Parameter(torch.randn(k, d, generator=generator))
        self.log_vars = nn.Parameter(torch.zeros(k, d))

    def forward(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Means and log variances of the components, [K, d] each."""
        return self.means, self.log_vars.clamp(*vampnets.LOG_VARIANCE)


class PseudoInputs(nn.Module):
    """The posteriors at K pseudo-inputs: u [K, 1, 28, 28], seen through the squashing function named `squash`.

    "hard-sigmoid": clip(0.2 u + 0.5, 0, 1) (the port); "clip": clip(u, 0, 1) (the paper's code). learned: u is a
    parameter, otherwise it stays as it is.
    """

    def __init__(self, u: Tensor, squash: str, learned: bool = True):
        super().__init__()
        self.squash = squash
        if learned:
            self.u = nn.Parameter(u)
        else:
            self.register_buffer("u", u)

    def images(self) -> Tensor:
        """What the encoder sees of them: [K, 1, 28, 28] in [0, 1]."""
        return (self.u if self.squash == "clip" else 0.2 * self.u + 0.5).clamp(0, 1)

    def forward(self, encoder: nn.Module) -> tuple[Tensor, Tensor]:
        """Means and log variances of the components, [K, d] each: one pass of the encoder."""
        return encoder(self.images())


def prior(kind: str, k: int, d: int, start: str, squash: str, images: Tensor, generator: torch.Generator) -> nn.Module:
    """The prior of a kind with k components in d dimensions.

    start: what pseudo-inputs are at first: "images": training images, drawn with replacement from images [N, 1, 28, 28]
    in uint8, then squashed, which the hard sigmoid does to [0.5, 0.7] (the port; known fault 13); "inverse": seen as
    such images, black and white half a grey level off; "noise": N(0.05, 0.01^2) (the paper's code). Raises ValueError:
    unknown names, k < 1.
    """
    if kind not in PRIORS:
        raise ValueError(f"unknown prior {kind!r}: use one of {', '.join(PRIORS)}")
    if start not in ("images", "inverse", "noise"):
        raise ValueError(f"unknown pseudo_init {start!r}: use images, inverse or noise")
    if k < 1:
        raise ValueError(f"components must be at least 1, got {k}")
    if kind == "standard":
        return Standard(d)
    if kind == "mog":
        return Mog(k, d, generator)
    chosen = images[torch.randint(len(images), (k,), generator=generator)].float() / 255
    if kind == "vamp-data":
        return PseudoInputs(chosen, "clip", learned=False)
    if start == "noise":
        return PseudoInputs(0.05 + 0.01 * torch.randn(chosen.shape, generator=generator), squash)
    if (start, squash) == ("images", "hard-sigmoid"):
        return PseudoInputs(chosen, squash)
    inside = chosen.clamp(HALF_GREY, 1 - HALF_GREY)
    return PseudoInputs(inside if squash == "clip" else (inside - 0.5) / 0.2, squash)


# ------------------------------------------------------------------------------------------------ the model
class VAE(nn.Module):
    """Encoder, decoder, prior of z2 and, in an HVAE, the lower layer.

    `done` counts the gradient steps: it is what the warm-up goes by.
    """

    def __init__(self, prior: nn.Module, encoder: nn.Module, decoder: nn.Module, lower: nn.Module | None = None):
        super().__init__()
        self.prior, self.encoder, self.decoder, self.lower = prior, encoder, decoder, lower
        self.register_buffer("done", torch.zeros(()))

    def components(self) -> tuple[Tensor, Tensor]:
        """Means and log variances of the prior's components, [K, d] each."""
        return self.prior(self.encoder)

    def terms(self, x: Tensor, generator: torch.Generator, components: tuple[Tensor, Tensor],
              k: int = 1) -> tuple[Tensor, ...]:
        """log p(x|z), log q(z2|x) - log p(z2) and, in an HVAE, log q(z1|x, z2) - log p(z1|z2), at k draws an image.

        x: [B, 1, 28, 28] in [0, 1] -> nats, [B, k] each.
        """
        def repeated(t: Tensor) -> Tensor:
            return t.repeat_interleave(k, 0) if k > 1 else t

        mean, log_var = (repeated(t) for t in self.encoder(x))
        z2 = reparameterise(mean, log_var, generator)
        found, codes = [diagonal_log_prob(z2, mean, log_var) - mixture_log_prob(z2, *components)], [z2]
        if self.lower:
            mean, log_var = self.lower.posterior(repeated(self.lower.features(x)), z2)
            z1 = reparameterise(mean, log_var, generator)
            found.append(diagonal_log_prob(z1, mean, log_var) - diagonal_log_prob(z1, *self.lower.prior(z2)))
            codes.append(z1)
        rec = bernoulli_log_prob(repeated(x), self.decoder(*codes).float())
        return tuple(t.view(len(x), k) for t in (rec, *found))


# ------------------------------------------------------------------------------------------------ training
def pixels(images: Tensor) -> Tensor:
    """uint8 [B, 1, 28, 28] -> float in [0, 1], channels last."""
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def training(model: VAE, generator: torch.Generator, lr: float, see: Callable | None = None, warmup: int = 0,
             per_epoch: int = 1, normalised: bool = False) -> tuple:
    """The step on uint8 images and the state it changes: (step, {name: item}) for `train.fit`.

    see(batch, generator) -> images in [0, 1]; None: grey pixels. The KL's weight is epoch / warmup in the epochs 1 to
    warmup, of per_epoch steps each, then 1. normalised: the gradient of every tensor is divided by its norm before Adam
    sees it (Yu et al. 2017; the paper's code, where a gate has two tensors, here one). The step returns, in nats per
    image, loss, rec and kl (unweighted, of all layers) and, in an HVAE, kl_z2 and kl_z1. Raises ValueError: lr not
    positive, warmup < 0.
    """
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0 epochs, got {warmup}")
    see = see or (lambda batch, _: pixels(batch))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = adam(weights, lr)

    def step(batch: Tensor) -> dict[str, Tensor]:
        optimizer.zero_grad()
        rec, *kls = (term.mean() for term in model.terms(see(batch, generator), generator, model.components()))
        kl = sum(kls)
        beta = (model.done.div(per_epoch).floor().add(1) / warmup).clamp(max=1) if warmup else 1.0
        loss = beta * kl - rec
        loss.backward()
        if normalised:
            gradients = [weight.grad for weight in weights]
            torch._foreach_div_(gradients, torch._foreach_add(torch._foreach_norm(gradients), FLOOR))
        optimizer.step()
        model.done.add_(1)
        return {"loss": loss, "rec": -rec, "kl": kl} | ({"kl_z2": kls[0], "kl_z1": kls[1]} if len(kls) > 1 else {})

    return step, {"model": model, "optimizer": optimizer, "generator": generator}


def validation(model: VAE, images: Tensor, generator: torch.Generator) -> Callable[[], dict[str, Tensor]]:
    """For the `look` of `train.fit`: () -> val_loss, val_rec and val_kl, minus the ELBO and its parts, nats per image.

    images: uint8 [N, 1, 28, 28], one draw of the codes each; the generator belongs into the state.
    """
    def look() -> dict[str, Tensor]:
        terms = evaluate(model, images, generator)
        rec, kl = -terms["rec"].mean(), terms["kl"].mean()
        return {"val_loss": rec + kl, "val_rec": rec, "val_kl": kl}

    return look


def by_epoch(history: dict[str, list], per_epoch: int) -> dict[str, list]:
    """A history as it is drawn: "epoch" beside its steps, and "loss" minus the ELBO, whatever weight the KL had."""
    loss = [rec + kl for rec, kl in zip(history.get("rec", []), history.get("kl", []), strict=True)]
    return history | {"epoch": [step / per_epoch for step in history["step"]], "loss": loss}


# ------------------------------------------------------------------------------------------------ evaluation
@torch.no_grad()
def evaluate(model: VAE, images: Tensor, generator: torch.Generator, rows: int = 500) -> dict[str, Tensor]:
    """elbo, rec, kl and, in an HVAE, kl_z2 and kl_z1 of uint8 images [N, 1, 28, 28]: nats, [N] each, at one draw."""
    with precision("fp32", images.device):
        components = model.components()
        parts = [torch.cat(model.terms(pixels(part), generator, components), 1) for part in images.split(rows)]
    rec, *kls = torch.cat(parts).double().T
    kl = sum(kls)
    return {"elbo": rec - kl, "rec": rec, "kl": kl} | ({"kl_z2": kls[0], "kl_z1": kls[1]} if len(kls) > 1 else {})


@torch.no_grad()
def codes(model: VAE, images: Tensor, generator: torch.Generator, rows: int = 500) -> dict[str, Tensor]:
    """Draws z2 (and z1) and the means mean_z2 (and mean_z1, at that z2) of uint8 images [N, 1, 28, 28]: [N, d] each."""
    parts = []
    with precision("fp32", images.device):
        for part in images.split(rows):
            x = pixels(part)
            mean, log_var = model.encoder(x)
            found = {"z2": reparameterise(mean, log_var, generator), "mean_z2": mean}
            if model.lower:
                mean, log_var = model.lower.posterior(model.lower.features(x), found["z2"])
                found |= {"z1": reparameterise(mean, log_var, generator), "mean_z1": mean}
            parts.append(found)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def pseudo_inputs(model: VAE, n: int) -> Tensor | None:
    """At most n pseudo-inputs of the prior as the encoder sees them, [n, 1, 28, 28] in [0, 1]; None: it has none."""
    return model.prior.images()[:n].clone() if isinstance(model.prior, PseudoInputs) else None


@torch.no_grad()
def reconstruct(model: VAE, images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [n, 1, 28, 28] -> [n, 2, 1, 28, 28] in [0, 1]: images beside the decoder's means at one draw."""
    found = codes(model, images, generator)
    with precision("fp32", images.device):
        decoded = model.decoder(*(found[name] for name in ("z2", "z1") if name in found)).sigmoid()
    return torch.stack([pixels(images), decoded], 1)


@torch.no_grad()
def sample(model: VAE, n: int, generator: torch.Generator, normal: bool = False, rows: int = 500) -> Tensor:
    """Pixel means [n, 1, 28, 28] at codes drawn from the model's own prior p(z2) (and p(z1|z2)).

    normal: all codes, of both layers, from N(0, I) instead, as the port's `sample` draws them (known fault 10).
    """
    parts = []
    with precision("fp32", generator.device):
        means, log_vars = model.components()
        for size in [rows] * (n // rows) + [n % rows] * (n % rows > 0):
            k = torch.randint(len(means), (size,), generator=generator, device=generator.device)
            standard = torch.zeros_like(means[k])
            z2 = reparameterise(*((standard, standard) if normal else (means[k], log_vars[k])), generator)
            drawn = [z2]
            if model.lower:
                drawn.append(reparameterise(*((standard, standard) if normal else model.lower.prior(z2)), generator))
            parts.append(model.decoder(*drawn).sigmoid())
    return torch.cat(parts)
