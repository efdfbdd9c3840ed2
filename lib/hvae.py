"""The two-layer HVAE with binary latents of symmetric learning (Flach, Schlesinger, Shekhovtsov, AISTATS 2024).

Bits z0 [B, n0] and z1 [B, n1] as floats in {0, 1}, images x [B, 1, S, S]; distributions of bits by their logits.
    p(x, z) = 2^-n0 p(z1|z0) p(x|z1)             x: Bernoulli pixels, or Gaussian ones with one learned sigma
    ladder   q(z|x) = q(z0|x) q(z1|z0, x)        logits of z1: those of p(z1|z0) plus a network's of x
    reverse  q(z|x) = q(z1|x) q(z0|z1)           the order of wake-sleep
"""
import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.stochastic import bernoulli, gaussian_log_prob

ENCODERS = ("ladder", "reverse")
GAUSSIAN = ("fashionmnist",)                                 # grey images; all others are binarised
CHAIN = 10                                                   # images that are sent to and fro while training


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
    """Logits [B, n_out] of bits from n_in inputs: some tanh layers `width` wide, plus a linear skip without bias."""

    def __init__(self, n_in: int, n_out: int, width: int, depth: int = 2):
        super().__init__()
        layers = [layer for a, b in pairwise([n_in, *[width] * depth]) for layer in (nn.Linear(a, b), Tanh())]
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
        self.to_z0 = SkipMLP(bits[1], bits[0], features, depth=3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Logits [B, n1]."""
        return (wide(self.to_z1(self.trunk(x))),)


class HVAE(nn.Module):
    """p(z1|z0), p(x|z1), an encoder of the given kind, and the running statistics of both.

    trunk: x -> [B, features]; decoder: z1 -> logits (or, if gaussian, means) of x; hidden: width of p(z1|z0)'s MLP.
    Raises ValueError: unknown encoder, no bits.
    """

    def __init__(self, encoder: str, bits: tuple[int, int], trunk: nn.Module, features: int, decoder: nn.Module,
                 gaussian: bool = False, image: tuple[int, ...] = (1, 28, 28), hidden: int = 600):
        super().__init__()
        if encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {encoder!r}: use {' or '.join(ENCODERS)}")
        if min(bits) < 1:
            raise ValueError(f"each layer needs at least one bit, got {bits[0]} and {bits[1]}")
        self.kind, self.bits, self.gaussian = encoder, bits, gaussian
        self.prior, self.decoder = SkipMLP(*bits, hidden), decoder
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

    def picture(self, output: Tensor, hard: bool = True) -> Tensor:
        """The decoder's output as images in [0, 1]: Gaussian: means, clipped; Bernoulli: p, rounded if hard."""
        if self.gaussian:
            return output.clamp(0, 1)
        return (output > 0).float() if hard else output.sigmoid()

    def nll_x(self, output: Tensor, x: Tensor) -> Tensor:
        """-log p(x|z1) in nats per image [B] (a density if gaussian) from the decoder's output."""
        if self.gaussian:
            return -gaussian_log_prob(x, output, self.log_sigma)
        return F.binary_cross_entropy_with_logits(output, x, reduction="none").flatten(1).sum(1)


def build(dataset: str, encoder: str, bits: tuple[int, int] = (30, 100), width: int = 32, hidden: int = 600) -> HVAE:
    """The work's networks for 28x28 images. Fashion-MNIST: encoder MLP 1000, ReLU decoder, Gaussian; else 600, tanh.

    width: base channels of the image networks; hidden: width of the MLPs. Raises ValueError: see `HVAE`.
    """
    gaussian = dataset in GAUSSIAN
    features = hidden * 5 // 3 if gaussian else hidden
    decoder = image_decoder(bits[1], width, nn.ReLU if gaussian else Tanh)
    return HVAE(encoder, bits, image_encoder(width, features), features, decoder, gaussian, hidden=hidden)


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
