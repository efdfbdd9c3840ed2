"""Log-probabilities, divergences and gradient estimators. All in nats; sums over the last dimension(s), batch kept."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

ESTIMATORS = ("disarm", "arm", "reinforce-loo", "zgr")       # of the gradient of E f(z), z bits, for their logits


def reparameterise(mean: Tensor, log_var: Tensor, generator: torch.Generator) -> Tensor:
    """z = mean + sigma * eps, eps ~ N(0, I); shapes [B, d] (Kingma & Welling 2013, section 2.4)."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + noise * torch.exp(0.5 * log_var)


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag var) || N(0, I)) in nats per item: [B, d] -> [B] (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_sigma: Tensor | float) -> Tensor:
    """log N(x; mean, sigma^2 I) in nats per item, summed over all dimensions but the first: [B, ...] -> [B].

    A log_sigma that is a float stays one: a CUDA graph could not copy it to the device.
    """
    scale = torch.exp(-log_sigma) if isinstance(log_sigma, Tensor) else math.exp(-log_sigma)
    terms = -0.5 * ((x - mean) * scale).square() - log_sigma - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)


def diagonal_log_prob(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(z; mean, diag exp(log_var)) in nats per item: [..., d] each -> [...]."""
    return -0.5 * ((z - mean).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(-1)


def mixture_log_prob(z: Tensor, means: Tensor, log_vars: Tensor) -> Tensor:
    """log of the equal mixture of K diagonal Gaussians in nats per item: z [B, d], means and log_vars [K, d] -> [B].

    The squares are multiplied out, so that the components cost a matrix product; it cancels, hence float64.
    """
    z, means, log_vars = z.double(), means.double(), log_vars.double()
    inverse = torch.exp(-log_vars)
    constant = (means.square() * inverse + log_vars).sum(1) + z.shape[1] * math.log(2 * math.pi)
    squares = torch.cat([z.square(), z], 1) @ torch.cat([inverse, -2 * means * inverse], 1).T
    return torch.logsumexp((-0.5 * (squares + constant)).float(), 1) - math.log(len(means))


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """log Bernoulli(x; sigmoid(logits)) in nats per item, summed over all dimensions but the first: [B, ...] -> [B].

    For x between 0 and 1 it is minus the cross-entropy, which is no log-probability.
    """
    return (x * logits - F.softplus(logits)).flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------ bits
def bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Bits drawn from Bernoulli(sigmoid(logits)), as floats in {0, 1} without gradient, any shape."""
    return torch.bernoulli(logits.detach().sigmoid(), generator=generator)


def zgr(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Bits drawn as by `bernoulli`, with the gradient of `zgr_at`."""
    return zgr_at(bernoulli(logits, generator), logits)


def zgr_at(z: Tensor, logits: Tensor) -> Tensor:
    """Given bits with the ZGR gradient: dz/dlogit := p/2 where z = 0, (1 - p)/2 where z = 1, p = sigmoid(logit).

    For bits ZGR (Shekhovtsov 2023) is DARN(1/2) (Gregor et al. 2014). It estimates the gradient of E f(z) by the
    trapezium rule f(1) - f(0) = (f'(0) + f'(1))/2 in each bit: exact for quadratic f, biased beyond. z stays 0 or 1.
    """
    p = logits.detach().sigmoid()
    slope = (z * (1 - p) + (1 - z) * p) / 2
    return z + slope * (logits - logits.detach())


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy of Bernoulli(sigmoid(logits)) in nats, elementwise."""
    return F.softplus(logits) - logits * logits.sigmoid()


def bernoulli_kl(logits: Tensor, prior: Tensor) -> Tensor:
    """KL between independent Bernoullis, given by their logits, in nats: [B, n], [B, n] -> [B]."""
    return (logits.sigmoid() * (logits - prior) - F.softplus(logits) + F.softplus(prior)).sum(-1)


# ------------------------------------------------------------------------------------------------ gradients of bits
# Unbiased estimates of the gradient of E f(z), z ~ Bernoulli(sigmoid(logits)), from f at two codes: no gradient of f is
# taken, and none passes through the estimate. Logits and bits [..., n], f [...] in the units that the gradient has.
def antithetic(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two opposed draws of the bits and their one uniform: z = 1[u > sigmoid(-logit)], z_anti = 1[u < sigmoid(logit)].

    Each is distributed as by `bernoulli`; a bit of z and its partner agree as seldom as they can. z and z_anti have
    the type of the logits; u is float32 at least, for a uniform of fewer digits would miss the probabilities.
    """
    wide = _wide(logits)
    u = torch.rand(wide.shape, generator=generator, device=wide.device, dtype=wide.dtype)
    return (u > torch.sigmoid(-wide)).to(logits.dtype), (u < torch.sigmoid(wide)).to(logits.dtype), u


def disarm(logits: Tensor, z: Tensor, z_anti: Tensor, f: Tensor, f_anti: Tensor) -> Tensor:
    """DisARM: (f(z) - f(z_anti))/2 * (-1)^z_anti 1[z != z_anti] sigmoid(|logit|) in each bit, of `antithetic` bits.

    It is ARM averaged over u with the bits given, so never of larger variance (Dong, Mnih, Tucker 2020, section 3).
    For bits (-1)^z_anti 1[z != z_anti] = z - z_anti. Returns the type of the logits.
    """
    difference = (f - f_anti).detach().unsqueeze(-1) / 2
    return (difference * (z - z_anti) * torch.sigmoid(_wide(logits).abs())).to(logits.dtype)


def arm(u: Tensor, f: Tensor, f_anti: Tensor) -> Tensor:
    """ARM: (f(z) - f(z_anti)) (u - 1/2) in each bit, bits and u of `antithetic` (Yin & Zhou 2019)."""
    return (f - f_anti).detach().unsqueeze(-1) * (u - 0.5)


def reinforce_loo(logits: Tensor, z: Tensor, z_other: Tensor, f: Tensor, f_other: Tensor) -> Tensor:
    """REINFORCE, each of two independent draws the baseline of the other: (f(z) - f(z_other))/2 * (z - z_other).

    With d log q(z)/d logit = z - sigmoid(logit) the probabilities cancel (Kool et al. 2019).
    Returns the type of the logits.
    """
    return ((f - f_other).detach().unsqueeze(-1) / 2 * (z - z_other)).to(logits.dtype)


def _wide(logits: Tensor) -> Tensor:
    """Without gradient, in float32 at least."""
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
