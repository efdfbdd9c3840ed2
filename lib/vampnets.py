"""Networks of the VampPrior works: the convolutional ones of the TensorFlow port, the gated ones of the paper's code.

x: images [B, 1, 28, 28] in [0, 1]. z2: the upper latent, whose prior is under test; z1: the lower one of an HVAE, with
p(z1|z2) and q(z1|x, z2). The port calls them z and z0. Every Gaussian is diagonal, its log variance clipped to [-6, 2].
"""
import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_VARIANCE = (-6.0, 2.0)
PIXELS = 28 * 28


class HardSigmoid(nn.Module):
    """clip(0.2 x + 0.5, 0, 1), TensorFlow's; PyTorch's has the slope 1/6."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape."""
        return (0.2 * x + 0.5).clamp(0, 1)


ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "selu": nn.SELU, "gelu": nn.GELU, "silu": nn.SiLU, "swish": nn.SiLU,
               "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "hard_sigmoid": HardSigmoid, "softplus": nn.Softplus,
               "softsign": nn.Softsign, "leaky_relu": partial(nn.LeakyReLU, 0.2), "linear": nn.Identity}


class Gaussian(nn.Module):
    """h [B, width] -> mean and log variance [B, d], float32."""

    def __init__(self, width: int, d: int):
        super().__init__()
        self.mean, self.log_var = nn.Linear(width, d), nn.Linear(width, d)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each [B, d]. bf16 would be too coarse: codes far out would have few values."""
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            return self.mean(h), self.log_var(h).clamp(*LOG_VARIANCE)


class Encoder(nn.Module):
    """q(z2|x): trunk, x -> h [B, width], and the Gaussian's heads."""

    def __init__(self, trunk: nn.Module, width: int, d: int):
        super().__init__()
        self.trunk, self.heads = trunk, Gaussian(width, d)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z2|x), each [B, d]."""
        return self.heads(self.trunk(x))


class Lower(nn.Module):
    """The lower layer of an HVAE: q(z1|x, z2), from features(x) and z2, and p(z1|z2)."""

    def __init__(self, features: nn.Module, from_z2: nn.Module, joint: nn.Module, width: int, prior: nn.Module,
                 prior_width: int, d: int):
        super().__init__()
        self.features, self.from_z2, self.joint, self.heads = features, from_z2, joint, Gaussian(width, d)
        self.prior_trunk, self.prior_heads = prior, Gaussian(prior_width, d)

    def posterior(self, features: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z1|x, z2) from features(x) [B, n] and z2 [B, d], each [B, d]."""
        return self.heads(self.joint(torch.cat([features, self.from_z2(z2)], -1)))

    def prior(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(z1|z2), each [B, d]."""
        return self.prior_heads(self.prior_trunk(z2))


# ------------------------------------------------------------------------------------------------ the port
def port(model: str, latent_dim: int, size: int, activation: str) -> dict[str, nn.Module]:
    """{"encoder", "decoder"} and, for model "hvae", "lower" of the port; size: its network_size, base width / 8.

    The HVAE gives each layer half of latent_dim. Its strided convolutions pad the first row and column where
    TensorFlow pads the last: the mirror image. Raises ValueError: unknown model or activation, sizes below 1, a
    latent_dim that cannot be halved.
    """
    if model not in ("vae", "hvae"):
        raise ValueError(f"unknown model {model!r}: use vae or hvae")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: use one of {', '.join(ACTIVATIONS)}")
    if latent_dim < 1 or size < 1:
        raise ValueError(f"latent_dim and network_size must be at least 1, got {latent_dim} and {size}")
    if model == "hvae" and latent_dim % 2:
        raise ValueError(f"an hvae shares latent_dim between its two layers: it must be even, got {latent_dim}")
    act = ACTIVATIONS[activation]
    d = latent_dim // 2 if model == "hvae" else latent_dim
    nets = {"encoder": Encoder(_port_trunk(size, act), 256, d), "decoder": PortDecoder(latent_dim, size, act)}
    if model == "hvae":
        nets["lower"] = Lower(_port_trunk(size, act), _dense([d, 256, 256], act), _dense([512, 256], act), 256,
                              _dense([d, 300, 300], nn.ReLU), 300, d)
    return nets


def _port_trunk(size: int, act) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8 * size, 7, 1, 3), act(), nn.Conv2d(8 * size, 16 * size, 3, 2, 1), act(),
                         nn.Conv2d(16 * size, 16 * size, 5, 1, 2), act(),
                         nn.Conv2d(16 * size, 32 * size, 3, 2, 1), act(), nn.Flatten(),
                         nn.Linear(7 * 7 * 32 * size, 256), nn.ReLU())


def _dense(widths: list[int], act) -> nn.Sequential:
    return nn.Sequential(*(layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), act())))


class PortDecoder(nn.Module):
    """Codes z2 (and z1), together [B, latent_dim], -> logits [B, 1, 28, 28]."""

    def __init__(self, latent_dim: int, size: int, act):
        super().__init__()
        layers = [nn.Linear(latent_dim, 7 * 7 * 32), nn.ReLU(), nn.Unflatten(1, (32, 7, 7))]
        for before, after, stride in ((32, 32 * size, 1), (32 * size, 16 * size, 2), (16 * size, 16 * size, 1),
                                      (16 * size, 8 * size, 2)):
            layers += [nn.ConvTranspose2d(before, after, 3, stride, 1, output_padding=stride - 1), act()]
        self.net = nn.Sequential(*layers, nn.ConvTranspose2d(8 * size, 1, 3, 1, 1))

    def forward(self, *codes: Tensor) -> Tensor:
        """Logits [B, 1, 28, 28]."""
        return self.net(torch.cat(codes, -1))


# ------------------------------------------------------------------------------------------------ the paper
class GatedLinear(nn.Linear):
    """A(x) * sigmoid(B(x)), A and B linear: [B, n] -> [B, width] (Dauphin et al. 2016)."""

    def __init__(self, n: int, width: int):
        super().__init__(n, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width]."""
        return F.glu(super().forward(x), -1)


class GatedConv2d(nn.Conv2d):
    """As GatedLinear, of convolutions: [B, n, S, S] -> [B, width, S', S']."""

    def __init__(self, n: int, width: int, kernel: int, stride: int = 1):
        super().__init__(n, 2 * width, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, S', S']."""
        return F.glu(super().forward(x), 1)


class GatedDecoder(nn.Module):
    """Codes z2 and z1 [B, d] each, or z2 alone, -> logits [B, 1, 28, 28]; end: [B, layers * hidden] -> 784."""

    def __init__(self, d: int, hidden: int, layers: int, end: nn.Module):
        super().__init__()
        self.own = nn.ModuleList(GatedLinear(d, hidden) for _ in range(layers))
        self.joint = end

    def forward(self, *codes: Tensor) -> Tensor:
        """Logits [B, 1, 28, 28]."""
        h = torch.cat([own(z) for own, z in zip(self.own, codes, strict=True)], -1)
        return self.joint(h).unflatten(1, (1, 28, 28))


def gated(model: str, d: int, hidden: int) -> dict[str, nn.Module]:
    """{"encoder", "decoder"} and, unless model is "vae", "lower" of the paper's code, d dimensions a layer.

    vae and hvae: gated dense layers of `hidden` units (300); convhvae: gated convolutions, and `hidden` units where
    they meet the codes. Raises ValueError: unknown model, sizes below 1.
    """
    if model not in ("vae", "hvae", "convhvae"):
        raise ValueError(f"unknown model {model!r}: use vae, hvae or convhvae")
    if min(d, hidden) < 1:
        raise ValueError(f"latent_dim and hidden must be at least 1, got {d} and {hidden}")
    convolutional, layers = model == "convhvae", 1 if model == "vae" else 2
    if convolutional:
        trunk, features, width = _gated_convolutions(7, 3, 5, 3), _gated_convolutions(3, 3, 3, 3), 6 * 7 * 7
        end = nn.Sequential(GatedLinear(2 * hidden, PIXELS), nn.Unflatten(1, (1, 28, 28)), GatedConv2d(1, 64, 3),
                            *(GatedConv2d(64, 64, 3) for _ in range(3)), nn.Conv2d(64, 1, 1), nn.Flatten())
    else:
        trunk = nn.Sequential(nn.Flatten(), GatedLinear(PIXELS, hidden), GatedLinear(hidden, hidden))
        features, width = nn.Sequential(nn.Flatten(), GatedLinear(PIXELS, hidden)), hidden
        end = nn.Sequential(GatedLinear(layers * hidden, hidden), nn.Linear(hidden, PIXELS))
    nets = {"encoder": Encoder(trunk, width, d), "decoder": GatedDecoder(d, hidden, layers, end)}
    if layers == 2:
        prior = nn.Sequential(GatedLinear(d, hidden), GatedLinear(hidden, hidden))
        nets["lower"] = Lower(features, GatedLinear(d, width), GatedLinear(2 * width, hidden), hidden, prior, hidden, d)
    return nets


def _gated_convolutions(*kernels: int) -> nn.Sequential:
    a, b, c, d = kernels
    return nn.Sequential(GatedConv2d(1, 32, a), GatedConv2d(32, 32, b, 2), GatedConv2d(32, 64, c),
                         GatedConv2d(64, 64, d, 2), GatedConv2d(64, 6, 3), nn.Flatten())


# ------------------------------------------------------------------------------------------------ weights
def initialise(net: nn.Module, how: str, generator: torch.Generator) -> None:
    """Draw all weights on the CPU. "glorot": uniform, biases 0 (the port, as Keras does); "he": dense weights
    N(0, 2 / fan in), everything else uniform within 1 / sqrt(fan in) (the paper's code, as PyTorch does)."""
    for layer in net.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        if how == "glorot":
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            continue
        bound = 1 / math.sqrt(layer.weight[0].numel())
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, math.sqrt(2) * bound, generator=generator)
        else:
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
