"""Log-probabilities, divergences and gradient estimators. All in nats; sums over the last dimension(s), batch kept."""
import math

import torch
from torch import Tensor


def reparameterise(mean: Tensor, log_var: Tensor, generator: torch.Generator) -> Tensor:
    """z = mean + sigma * eps, eps ~ N(0, I); shapes [B, d] (Kingma & Welling 2013, section 2.4)."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + noise * torch.exp(0.5 * log_var)


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag var) || N(0, I)) in nats per item: [B, d] -> [B] (Kingma & Welling 2013, appendix B)."""
    return 0.5 * (mean.square() + log_var.exp() - log_var - 1).sum(-1)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_sigma: Tensor | float) -> Tensor:
    """log N(x; mean, sigma^2 I) in nats per item, summed over all dimensions but the first: [B, ...] -> [B]."""
    log_sigma = torch.as_tensor(log_sigma, dtype=x.dtype, device=x.device)
    terms = -0.5 * ((x - mean) * torch.exp(-log_sigma)).square() - log_sigma - 0.5 * math.log(2 * math.pi)
    return terms.flatten(1).sum(1)
