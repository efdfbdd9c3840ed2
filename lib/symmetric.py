"""Symmetric equilibrium learning of a two-layer binary HVAE (Flach, Schlesinger, Shekhovtsov, AISTATS 2024).

Bits z0 [B, n0] and z1 [B, n1] as floats in {0, 1}, images x [B, 1, S, S]; all distributions of bits by their logits.
    p(x, z) = 2^-n0 p(z1|z0) p(x|z1)             x: Bernoulli pixels, or Gaussian ones with one learned sigma
    ladder   q(z|x) = q(z0|x) q(z1|z0, x)        logits of z1: those of p(z1|z0) plus a network's of x
    reverse  q(z|x) = q(z1|x) q(z0|z1)           the order of wake-sleep
Learning, one gradient step each (nats per image):
    symmetric  p: -log p(x, z), x data, z ~ q(.|x);   then q: -log q(z|x), (x, z) ~ p;   two Adams
    elbo       -E_q log p(x|z1) + KL(q(z|x) || p(z)), gradients through the bits by ZGR, one Adam
"""
import math
from collections.abc import Callable
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.evaluate import exact
from lib.stochastic import bernoulli, bernoulli_entropy, bernoulli_kl, gaussian_log_prob, zgr, zgr_at
from lib.train import precision

ENCODERS = ("ladder", "reverse")
LEARNING = ("symmetric", "elbo")
GAUSSIAN = ("fashionmnist",)                                 # grey images; all others are binarised
THRESHOLD = 0.4375                                           # of the binarisation, as in the work
FLIPPED, NOISE, DECAY, CHAIN = 0.001, 0.01, 0.99, 10
LEARNT_FROM = ("dataset", "encoder", "learning", "z0_bits", "z1_bits", "width", "batch_size", "lr", "held_out", "seed",
               "precision")                                  # the notebook's parameters that the weights depend on


# ------------------------------------------------------------------------------------------------ networks
def wide(logits: Tensor) -> Tensor:
    """bf16 would be too coarse for draws and losses: float32 (a float64 stays)."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


class _SigmoidTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.mul(2).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        return torch.ops.aten.tanh_backward(gradient, *ctx.saved_tensors)


class Tanh(nn.Module):
    """tanh; on the CPU as 2 sigmoid(2x) - 1: the same to 2e-7, ten times faster than PyTorch's, a quarter of a step."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return torch.tanh(x) if x.is_cuda else _SigmoidTanh.apply(x)


class FullConv2d(nn.Conv2d):
    """A convolution whose kernel is as large as its input, [B, C, k, k] -> [B, D, 1, 1], as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Channels last, so that nothing is moved."""
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))
        return F.linear(x, weight, self.bias)[:, :, None, None]


class FullConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of a single pixel, [B, C, 1, 1] -> [B, D, k, k], as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Channels last, so that nothing is moved."""
        weight = self.weight.permute(0, 2, 3, 1)                                        # [C, k, k, D]
        return ((x.flatten(1) @ weight.flatten(1)).unflatten(1, weight.shape[1:]) + self.bias).permute(0, 3, 1, 2)


class SkipMLP(nn.Module):
    """Logits [B, n_out] of bits from n_in inputs: `hidden` tanh layers 600 wide, plus a linear skip without bias."""

    def __init__(self, n_in: int, n_out: int, hidden: int = 2, width: int = 600):
        super().__init__()
        layers = [layer for a, b in pairwise([n_in, *[width] * hidden]) for layer in (nn.Linear(a, b), Tanh())]
        self.net, self.skip = nn.Sequential(*layers, nn.Linear(width, n_out)), nn.Linear(n_in, n_out, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        """Logits [B, n_out]."""
        return wide(self.net(z) + self.skip(z))


def image_encoder(width: int, features: int) -> nn.Sequential:
    """Seven convolutions with tanh, 28-28-27-13-11-9-4-1: x [B, 1, 28, 28] -> [B, features]; width: base channels."""
    w = width
    layers = [(1, w, 3, 1, 1), (w, w, 2, 1, 0), (w, 2 * w, 3, 2, 0), (2 * w, 2 * w, 3, 1, 0), (2 * w, 2 * w, 3, 1, 0),
              (2 * w, 4 * w, 3, 2, 0)]
    parts = [part for layer in layers for part in (nn.Conv2d(*layer), Tanh())]
    return nn.Sequential(*parts, FullConv2d(4 * w, features, 4), Tanh(), nn.Flatten())


def image_decoder(bits: int, width: int, activation: type[nn.Module]) -> nn.Sequential:
    """The encoder backwards, 1-4-9-11-13-27-28-28: z1 [B, bits] -> logits or means [B, 1, 28, 28]."""
    w = width
    layers = [(4 * w, 2 * w, 3, 2), (2 * w, 2 * w, 3, 1), (2 * w, 2 * w, 3, 1), (2 * w, w, 3, 2), (w, w, 2, 1)]
    parts = [part for layer in layers for part in (nn.ConvTranspose2d(*layer), activation())]
    return nn.Sequential(nn.Unflatten(1, (bits, 1, 1)), FullConvTranspose2d(bits, 4 * w, 4), activation(), *parts,
                         nn.Conv2d(w, 1, 3, 1, 1))


class LadderEncoder(nn.Module):
    """x -> (logits of q(z0|x) [B, n0], what x adds to the logits of p(z1|z0) [B, n1])."""

    def __init__(self, bits: tuple[int, int], trunk: nn.Module, features: int):
        super().__init__()
        self.trunk, self.to_z1 = trunk, nn.Linear(features, bits[1])
        self.to_z0 = nn.Sequential(nn.Linear(features, features), Tanh(), nn.Linear(features, features), Tanh(),
                                   nn.Linear(features, bits[0]))
        self.skip = nn.Linear(bits[1], bits[0], bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, n0] and [B, n1]."""
        h = self.trunk(x)
        added = self.to_z1(h)
        return wide(self.to_z0(h) + self.skip(added)), wide(added)


class ReverseEncoder(nn.Module):
    """x -> (logits of q(z1|x) [B, n1],); `to_z0`: z1 -> logits of q(z0|z1)."""

    def __init__(self, bits: tuple[int, int], trunk: nn.Module, features: int):
        super().__init__()
        self.trunk, self.to_z1 = trunk, nn.Linear(features, bits[1])
        self.to_z0 = SkipMLP(bits[1], bits[0], hidden=3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Logits [B, n1]."""
        return (wide(self.to_z1(self.trunk(x))),)


class HVAE(nn.Module):
    """p(z1|z0), p(x|z1), an encoder of the given kind, and the running statistics of both.

    trunk: x -> [B, features]; decoder: z1 -> logits (or, if gaussian, means) of x. Raises ValueError: unknown encoder.
    """

    def __init__(self, encoder: str, bits: tuple[int, int], trunk: nn.Module, features: int, decoder: nn.Module,
                 gaussian: bool = False, image: tuple[int, ...] = (1, 28, 28)):
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {encoder!r}: use {' or '.join(ENCODERS)}")
        if min(bits) < 1:
            raise ValueError(f"each layer needs at least one bit, got {bits[0]} and {bits[1]}")
        self.kind, self.bits, self.gaussian = encoder, bits, gaussian
        self.prior, self.decoder = SkipMLP(*bits), decoder
        self.encoder = (LadderEncoder if encoder == "ladder" else ReverseEncoder)(bits, trunk, features)
        if gaussian:
            self.log_sigma = nn.Parameter(torch.zeros(()))
        for name, n in (("p_z1", bits[1]), ("q_z0", bits[0]), ("q_z1", bits[1])):
            self.register_buffer(f"mean_{name}", torch.full((n,), 0.5))      # running means of the bits' probabilities
            self.register_buffer(f"mi_{name}", torch.zeros(n))               # and of their mutual information, in bits
        self.register_buffer("chain", torch.full((CHAIN, *image), 0.5))      # images sent to and fro, once a step

    def generative(self) -> list[nn.Parameter]:
        """The parameters of p; those of q are the encoder's."""
        own = [self.log_sigma] if self.gaussian else []
        return [*self.prior.parameters(), *self.decoder.parameters(), *own]

    def draw_q(self, a: tuple, generator: torch.Generator, bit: Callable = bernoulli) -> tuple[Tensor, ...]:
        """(z0, z1, logits of q(z0|.), of q(z1|.) and of p(z1|z0)) from a = encoder(x); bit: how bits are drawn.

        The last is None for the reverse encoder, which does not need it to draw.
        """
        if self.kind == "ladder":
            z0 = bit(a[0], generator)
            logits = self.prior(z0)
            return z0, bit(logits + a[1], generator), a[0], logits + a[1], logits
        z1 = bit(a[0], generator)
        logits = self.encoder.to_z0(z1)
        return bit(logits, generator), z1, logits, a[0], None

    def q_logits(self, a: tuple, z0: Tensor, z1: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of q(z0|.) and q(z1|.) at the given bits; prior: the logits of p(z1|z0), whose gradient is stopped."""
        if self.kind == "ladder":
            return a[0], prior.detach() + a[1]
        return self.encoder.to_z0(z1), a[0]

    def draw_z(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """n draws from the prior: (z0, z1, logits of p(z1|z0))."""
        z0 = bernoulli(self.mean_q_z0.new_zeros(n, self.bits[0]), generator)
        logits = self.prior(z0)
        return z0, bernoulli(logits, generator), logits

    def decode(self, z1: Tensor) -> Tensor:
        """z1 [B, n1] -> logits or, if gaussian, means of p(x|z1), [B, 1, S, S]."""
        return wide(self.decoder(z1))

    def draw_x(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A draw of x from the decoder's output."""
        if not self.gaussian:
            return bernoulli(output, generator)
        noise = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        return output + self.log_sigma.exp() * noise

    def nll_x(self, output: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z1) in nats per image [B] (a density if gaussian) from the decoder's output."""
        if self.gaussian:
            return -gaussian_log_prob(x, output, self.log_sigma)
        return F.binary_cross_entropy_with_logits(output, x, reduction="none").flatten(1).sum(1)


def build(dataset: str, encoder: str, bits: tuple[int, int] = (30, 100), width: int = 32) -> HVAE:
    """The work's networks for 28x28 images. Fashion-MNIST: 1000 features, ReLU decoder, Gaussian; else 600 and tanh."""
    gaussian = dataset in GAUSSIAN
    features = 1000 if gaussian else 600
    decoder = image_decoder(bits[1], width, nn.ReLU if gaussian else Tanh)
    return HVAE(encoder, bits, image_encoder(width, features), features, decoder, gaussian)


def initialise(model: HVAE, generator: torch.Generator) -> HVAE:
    """PyTorch's default weights, U(±1/sqrt(fan in)), and the start of the chain, drawn from a CPU generator."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            bound = 1 / math.sqrt(nn.init._calculate_fan_in_and_fan_out(module.weight)[0])
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    noise = torch.rand(model.chain.shape, generator=generator)
    model.chain.copy_(noise if model.gaussian else noise.round())
    return model


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
        state["optimizer"] = _adam(model.parameters(), lr)
        return _elbo_step(model, state["optimizer"], generator), state
    state |= {"p_optimizer": _adam(model.generative(), lr), "q_optimizer": _adam(model.encoder.parameters(), lr)}
    return _symmetric_step(model, state["p_optimizer"], state["q_optimizer"], generator), state


def _adam(parameters, lr: float) -> torch.optim.Adam:
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=parameters[0].is_cuda)


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
def picture(model: HVAE, output: Tensor, hard: bool = True) -> Tensor:
    """The decoder's output as images in [0, 1]: Gaussian: means, clipped; Bernoulli: p, rounded if hard."""
    if model.gaussian:
        return output.clamp(0, 1)
    return (output > 0).float() if hard else output.sigmoid()


@torch.no_grad()
def sweep(model: HVAE, x: Tensor, generator: torch.Generator) -> Tensor:
    """One step of the chain x -> z ~ q(.|x) -> x ~ p(.|z), images [B, 1, S, S]."""
    return model.draw_x(model.decode(model.draw_q(model.encoder(x), generator)[1]), generator)


@torch.no_grad()
def random_code(model: HVAE, n: int, generator: torch.Generator, hard: bool = True) -> Tensor:
    """n images [n, 1, S, S] in [0, 1] from random codes: z0 uniform, z1 ~ p(.|z0), the decoder's `picture`."""
    with precision("fp32", model.chain.device):
        parts = [picture(model, model.decode(model.draw_z(size, generator)[1]), hard) for size in _sizes(n)]
    return torch.cat(parts)


@torch.no_grad()
def limiting(model: HVAE, n: int, sweeps: list[int], generator: torch.Generator,
             hard: bool = True) -> dict[int, Tensor]:
    """Images [n, 1, S, S] in [0, 1] after each of the given numbers of sweeps, seen through one more encode-decode.

    The chain starts at images of the model, or at random bits if gaussian, as the work's does. ValueError: no sweeps.
    """
    if not sweeps or min(sweeps) < 0:
        raise ValueError(f"give at least one number of sweeps, none negative, got {sweeps}")
    found = {k: [] for k in sorted(set(sweeps))}
    with precision("fp32", model.chain.device):
        for size in _sizes(n):
            x = _start(model, size, generator)
            for k in range(max(sweeps) + 1):
                output = model.decode(model.draw_q(model.encoder(x), generator)[1])
                if k in found:
                    found[k].append(picture(model, output, hard))
                x = model.draw_x(output, generator)
    return {k: torch.cat(parts) for k, parts in found.items()}


def _start(model: HVAE, n: int, generator: torch.Generator) -> Tensor:
    if not model.gaussian:
        return model.draw_x(model.decode(model.draw_z(n, generator)[1]), generator)
    return bernoulli_like(model.chain.new_empty(n, *model.chain.shape[1:]), 0.5, generator)


def _sizes(n: int, size: int = 500) -> list[int]:
    return [size] * (n // size) + [n % size] * (n % size > 0)


@torch.no_grad()
def reconstruct(model: HVAE, batch: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [n, 1, S, S] -> [n, 2, 1, S, S] in [0, 1]: what the model sees of each image beside one reconstruction."""
    x = images(batch, model.gaussian)
    with precision("fp32", x.device):
        output = model.decode(model.draw_q(model.encoder(x), generator)[1])
    return torch.stack([x, picture(model, output, hard=False)], 1)


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


def elbo_gradients(model: HVAE, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [P] of -ELBO over the encoder's parameters, by enumeration: the exact one, and the mean of ZGR's.

    batch: uint8 [B, 1, S, S]. For models of a few bits: 2^(n0 + n1) codes an image.
    """
    dtype, x = next(model.parameters()).dtype, images(batch, model.gaussian)
    codes = torch.tensor(list(product((0.0, 1.0), repeat=sum(model.bits))), dtype=dtype, device=x.device)
    x, codes = x.to(dtype).repeat_interleave(len(codes), 0), codes.repeat(len(x), 1)
    z0, z1 = codes.split(model.bits, 1)
    order = (z0, z1) if model.kind == "ladder" else (z1, z0)

    def drawn(bit):
        bits = iter(order)
        return model.draw_q(model.encoder(x), None, lambda logits, _: bit(next(bits), logits))

    exact_draw = drawn(lambda z, _: z)
    log_q = -cross_entropy(exact_draw[2], z0) - cross_entropy(exact_draw[3], z1)
    log_p = -sum(p_loss(model, x, z0, z1)) - model.bits[0] * math.log(2)
    q, own = log_q.exp(), list(model.encoder.parameters())
    losses = (q * (log_q - log_p)).sum(), (q.detach() * sum(elbo_loss(model, x, drawn(zgr_at)))).sum()
    return tuple(torch.cat([g.flatten() for g in torch.autograd.grad(loss / len(batch), own)]) for loss in losses)


def information(model: HVAE) -> dict[str, dict]:
    """The running mutual information of each layer's bits with what they depend on, summed, in bits (work's estimate).

    p_z1: z1 with z0 under p; q_z0, q_z1: each layer with what q conditions it on.
    """
    return {f"mi_{name}": exact(getattr(model, f"mi_{name}").sum(), "bits") for name in ("p_z1", "q_z0", "q_z1")}


def as_bytes(pictures: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, as they are saved in a file."""
    return (255 * pictures).round().to(torch.uint8)
