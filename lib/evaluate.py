"""Metrics: pure functions of tensors, numerics pinned (float64 where sums are long). Every number carries its error."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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


# ------------------------------------------------------------------------------------------------ Frechet distance
@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features, kept by disjoint blocks of the rows: float64 on the CPU.

    counts [K], means [K, d] and scatters [K, d, d] (sums of outer products of deviations from the block's mean).
    """
    counts: Tensor
    means: Tensor
    scatters: Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.counts.sum())

    @property
    def mean(self) -> Tensor:
        """Mean [d]."""
        return self.counts @ self.means / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [d, d]: blocks merged as in Chan, Golub and LeVeque 1983."""
        apart = self.means - self.mean
        return (self.scatters.sum(0) + (apart.T * self.counts) @ apart) / (self.n - 1)

    def without(self, k: int) -> "Moments":
        """The moments of all blocks but the k-th."""
        keep = torch.arange(len(self.counts)) != k
        return Moments(self.counts[keep], self.means[keep], self.scatters[keep])


def moments(features: Tensor | Iterable[Tensor], blocks: int = 20) -> Moments:
    """Moments of features [n, d], or of an iterable of chunks of them, read once; row i belongs to block i mod blocks.

    Raises ValueError: fewer than two rows, chunks of unequal d or not [n, d], values that are not finite, blocks < 1.
    """
    if blocks < 1:
        raise ValueError(f"moments need at least one block, got {blocks}")
    counts, means, scatters, seen = torch.zeros(blocks, dtype=torch.float64), None, None, 0
    for x in _gathered(features):
        if means is None:
            means, scatters = x.new_zeros(blocks, x.shape[1]), x.new_zeros(blocks, x.shape[1], x.shape[1])
        if not x.isfinite().all():
            raise ValueError("features are not finite: look at the images or the network they come from")
        for k in range(min(blocks, len(x))):
            own = (seen + k) % blocks
            _merge(counts, means, scatters, own, x[k::blocks])
        seen += len(x)
    if seen < 2:
        raise ValueError(f"a covariance needs at least two feature vectors, got {seen}")
    return Moments(counts, means.cpu(), scatters.cpu())


def _gathered(features: Tensor | Iterable[Tensor], rows: int = 4096) -> Iterator[Tensor]:
    """Small chunks put together and large ones split: float64 [about `rows`, d] each."""
    held, n, d = [], 0, None
    for chunk in [features] if isinstance(features, Tensor) else features:
        if chunk.ndim != 2 or chunk.shape[1] != (d := d or chunk.shape[1]):
            raise ValueError(f"features must be [n, d], all of one d, got {list(chunk.shape)}")
        for part in chunk.detach().split(rows):
            held, n = [*held, part], n + len(part)
            if n >= rows:
                yield torch.cat(held).double()
                held, n = [], 0
    if n:
        yield torch.cat(held).double()


def _merge(counts: Tensor, means: Tensor, scatters: Tensor, k: int, x: Tensor) -> None:
    """Add rows x [m, d] to block k, in place, without cancellation (Chan, Golub and LeVeque 1983)."""
    before, m, mean = counts[k].item(), len(x), x.mean(0)
    apart = mean - means[k]
    centred = x - mean
    scatters[k] += centred.T @ centred + torch.outer(apart, apart) * (before * m / (before + m))
    means[k] += apart * (m / (before + m))
    counts[k] += m


def _gaussian(of: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [d], trace of the covariance, a root R [d, r] of it: R R^T, r its numerical rank)."""
    covariance = of.covariance
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return of.mean, covariance.trace(), vectors[:, keep] * values[keep].sqrt()


def _between(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> float:
    """|m_a - m_b|^2 + Tr(A + B - 2 (A B)^(1/2)): the singular values of the roots' product are those of (A B)^(1/2)."""
    overlap = torch.linalg.svdvals(a[2].T @ b[2]).sum()
    return ((a[0] - b[0]).square().sum() + a[1] + b[1] - 2 * overlap).item()


def frechet_distance(features_a: Tensor | Iterable[Tensor] | Moments,
                     features_b: Tensor | Iterable[Tensor] | Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the features' means and covariances, >= 0.

    features [n, d], chunks of them, or their Moments. Dowson and Landau 1982; as in Heusel et al. 2017, not its root.
    Of samples it is too large by about c/n: see `frechet`. Raises ValueError as `moments` does, or if d differs.
    """
    a, b = _pair(features_a, features_b, blocks=1)
    return max(0.0, _between(_gaussian(a), _gaussian(b)))


def _pair(a, b, blocks: int) -> tuple[Moments, Moments]:
    a, b = (x if isinstance(x, Moments) else moments(x, blocks) for x in (a, b))
    if a.means.shape[1] != b.means.shape[1]:
        raise ValueError(f"features of {a.means.shape[1]} and {b.means.shape[1]} dimensions cannot be compared")
    return a, b


def frechet(features_a: Tensor | Iterable[Tensor] | Moments, features_b: Tensor | Iterable[Tensor] | Moments,
            unit: str = "squared feature distance", blocks: int = 20, debias: bool = False) -> dict:
    """`frechet_distance` as a metric with its standard error, by the jackknife over `blocks` of each set's rows.

    The distance is computed anew without each block, of a and of b in turn; the spread gives the standard error and
    the mean shift the bias of order 1/n, which `debias` subtracts (the value can then be negative). Delete-a-group
    jackknife of Busing, Meijer and van der Leeden 1999; too large, by up to 2 where the distributions are equal.
    Moments of a single block count as known exactly. n is the smaller set's; se None if all rows but a block's are
    fewer than two, or both sets are known. Trust neither se nor debiased value unless n >> d.
    """
    a, b = _pair(features_a, features_b, blocks)
    whole_a, whole_b = _gaussian(a), _gaussian(b)
    value = _between(whole_a, whole_b)
    parts = [_jackknife(a, whole_b, value), _jackknife(b, whole_a, value)]
    known = all(variance is not None for _, variance in parts)
    se = sum(variance for _, variance in parts) ** 0.5 if known else None
    value = value - sum(bias for bias, _ in parts) if debias else max(0.0, value)
    return {"value": value, "se": se or None, "n": min(a.n, b.n), "unit": unit}


def _jackknife(of: Moments, other: tuple, value: float) -> tuple[float, float | None]:
    """(bias, variance) of the distance `value` that comes from sampling one of the two sets."""
    blocks = [k for k, count in enumerate(of.counts.tolist()) if count]
    if len(of.counts) == 1:
        return 0.0, 0.0
    if of.n - of.counts.max() < 2:
        return 0.0, None
    left_out = torch.tensor([_between(_gaussian(of.without(k)), other) for k in blocks], dtype=torch.float64)
    ratio = of.n / of.counts[blocks]
    corrected = len(blocks) * value - ((1 - 1 / ratio) * left_out).sum()
    pseudo = ratio * value - (ratio - 1) * left_out
    variance = ((pseudo - corrected).square() / (ratio - 1)).mean()
    return value - corrected.item(), variance.item()


def fid(images_a: Tensor | Iterable[Tensor] | Moments, images_b: Tensor | Iterable[Tensor] | Moments,
        device: str | torch.device = "auto", batch_size: int = 50, dims: int = 2048, blocks: int = 10,
        debias: bool = False) -> dict:
    """Frechet inception distance as a metric: images uint8 [N, 1 or 3, H, W], chunks of them, or their `fid_moments`.

    Heusel et al. 2017; the value of `python -m pytorch_fid` on PNGs of these images. se and debias: see `frechet`.
    Raises DataError: no weights of the Inception network, or corrupt ones; ValueError: other images, fewer than two.
    """
    sets = [x if isinstance(x, Moments) else fid_moments(x, device, batch_size, dims, blocks)
            for x in (images_a, images_b)]
    return frechet(*sets, unit="FID", debias=debias)


def fid_moments(images: Tensor | Iterable[Tensor], device: str | torch.device = "auto", batch_size: int = 50,
                dims: int = 2048, blocks: int = 10) -> Moments:
    """Moments of the images' Inception features, for several `fid`s against one set of images; errors as there."""
    from lib import inception
    return moments(inception.features(inception.load(device, dims), images, batch_size), blocks)
