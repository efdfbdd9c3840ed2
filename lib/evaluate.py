"""Metrics: pure functions of tensors, numerics pinned (float64 where sums are long). Every number carries its error."""
import torch
from torch import Tensor

KERNELS = ("original", "gaussian")


def estimate(samples: Tensor, unit: str) -> dict:
    """Mean of samples [n] with its standard error, as a metric {"value", "se", "n", "unit"}. ValueError if n = 0."""
    samples = samples.detach().double().flatten()
    n = len(samples)
    if n == 0:
        raise ValueError("cannot estimate a mean from no samples")
    se = (samples.std() / n ** 0.5).item() if n > 1 else None
    return {"value": samples.mean().item(), "se": se, "n": n, "unit": unit}


def exact(value: float | Tensor, unit: str) -> dict:
    """A number without sampling error (a count, a closed form, an enumeration) as a metric."""
    return {"value": float(torch.as_tensor(value).detach()), "se": None, "n": 1, "unit": unit}


def kernel(x: Tensor, y: Tensor, kind: str = "original") -> Tensor:
    """Kernel matrix [n, m] of x [n, d] and y [m, d].

    "original": exp(-mean_d (x-y)^2 / d) = exp(-|x-y|^2 / d^2), as VAEs-Implementations computes it (known fault 8: the
    mean over d is divided by d once more); "gaussian": exp(-|x-y|^2 / d), the mean taken once. ValueError for others.
    """
    if kind not in KERNELS:
        raise ValueError(f"unknown kernel {kind!r}: use one of {', '.join(KERNELS)}")
    d = x.shape[-1]
    squared = (x[:, None] - y[None]).square().sum(-1)
    return torch.exp(-squared / (d * d if kind == "original" else d))


def mmd(x: Tensor, y: Tensor, kind: str = "original") -> Tensor:
    """Squared maximum mean discrepancy, the biased V-statistic the work trains with: x [n, d], y [m, d] -> 0-d tensor.

    Gretton et al. 2012, equation 5. With equal distributions it has mean about 2 (1 - E k) / n, not 0.
    """
    return kernel(x, x, kind).mean() + kernel(y, y, kind).mean() - 2 * kernel(x, y, kind).mean()


def mmd_unbiased(x: Tensor, y: Tensor, kind: str = "original", block: int = 500) -> dict:
    """Squared MMD without bias (Gretton et al. 2012, lemma 6): mean and error over disjoint blocks of x, y [n, d].

    The points are shuffled first (by a fixed seed): blocks of a sorted data set would be other distributions than the
    whole. Raises ValueError if there are fewer than two points.
    """
    n = min(len(x), len(y))
    block = min(block, n)
    if block < 2:
        raise ValueError(f"the unbiased MMD needs at least two points of each kind, got {len(x)} and {len(y)}")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    x, values = x[order], []
    for i in range(0, n - block + 1, block):
        a, b = x[i:i + block].double(), y[i:i + block].double()
        within = sum(kernel(c, c, kind).sum() - block for c in (a, b)) / (block * (block - 1))
        values.append(within - 2 * kernel(a, b, kind).mean())
    return estimate(torch.stack(values), "squared MMD")
