"""Metrics: pure functions of tensors, numerics pinned (float64 where sums are long). Every number carries its error."""
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lib.disentanglement import dci, disentanglement, mig, mutual_information  # noqa: F401 (for those who import evaluate)
from lib.numerics import precision
from lib.wasserstein import baseline, patch_swd, sliced_wasserstein  # noqa: F401

KERNELS = ("original", "gaussian")
ROWS = {"cpu": 1000, "cuda": 5000}   # pairs per call of log_weights, see `log_likelihood`


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
    return {"value": float(value.detach() if isinstance(value, Tensor) else value), "se": None, "n": 1, "unit": unit}


def paired(a: Sequence[float], b: Sequence[float], unit: str, confidence: float = 0.95) -> dict:
    """Mean of a_i - b_i over paired runs, one seed each, as a metric with an interval: low and high beside its keys.

    Student's t interval with n - 1 degrees of freedom, which takes the differences for normal: where it lies above 0,
    a is the larger at this confidence. Raises ValueError: lists of unequal length, fewer than two pairs, numbers that
    are not finite, confidence not in (0, 1).
    """
    from scipy import stats
    if len(a) != len(b):
        raise ValueError(f"pairs need as many numbers of each kind, got {len(a)} and {len(b)}")
    if len(a) < 2:
        raise ValueError(f"an interval needs at least two pairs, got {len(a)}")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must lie between 0 and 1, got {confidence}")
    differences = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    if not differences.isfinite().all():
        raise ValueError(f"the differences must be finite, got {differences.tolist()}")
    found = estimate(differences, unit)
    half = float(stats.t.ppf((1 + confidence) / 2, found["n"] - 1)) * found["se"]
    return {**found, "low": found["value"] - half, "high": found["value"] + half}


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


# ------------------------------------------------------------------------------------------------ likelihoods
@torch.no_grad()
def log_likelihood(log_weights: Callable[[Tensor, int], Tensor], images: Tensor, samples: int = 5000,
                   bounds: Iterable[int] = (), rows: int | None = None) -> dict[str, Tensor]:
    """Importance-sampled log p(x) of each of the images [N, ...] and lower bounds of it: nats per image, float64 [N].

    log_weights(x [B, ...], k) -> [B, k], float32 or float64: log p(x, z) - log q(z|x) in nats for k independent draws
    z ~ q(.|x) of each image, on the images' device; -inf is a weight of zero. With w the weights of one image:
    "log_likelihood": log mean w, the IWAE bound of `samples` draws (Burda et al. 2015, equation 8; Rezende et al. 2014,
    appendix E). Its mean is below log p(x), by about 1/2 of its variance; its own standard error is about
    sqrt(1 / ess - 1 / samples) while ess is large, and cannot be told when it is not;
    "elbo": mean log w (IWAE-1); "iwae_<k>" for each k of `bounds`: the mean over the samples/k disjoint groups of k
    draws of log mean w. On the same draws they are ordered by Jensen's inequality: to test the order, draw anew;
    "ess": effective sample size (sum w)^2 / sum w^2, between 1 and `samples` (0 if all weights are zero).

    A call is asked for at most `rows` pairs (image, draw): some images with all their draws, or one with a part. The
    default is 1000 on the CPU (measured on gated 300-unit nets: flat from 750 to 2000, half as fast from 10,000) and
    5000 on CUDA (not measured), where a row of a wide convolutional decoder takes 1 MB. One image's weights are kept
    whole (8 bytes a draw) and summed in float64; full float32 is set here for log_weights, whatever the caller trains
    in. What does not depend on x, as a VampPrior's components, log_weights should compute once, outside.

    Raises ValueError: no images, samples or rows < 1, a k that does not divide samples, log weights of another shape or
    dtype, NaN or +inf among them.
    """
    bounds, rows = tuple(bounds), ROWS.get(images.device.type, ROWS["cpu"]) if rows is None else rows
    _check_sizes(len(images), samples, bounds, rows)
    size, parts = max(1, rows // samples), []
    with precision("fp32", images.device), _progress(len(images)) as bar:
        for x in images.split(size):
            weights = _weights(log_weights, x, samples, rows)
            bad = (weights.isnan() | (weights == math.inf)).any(1).nonzero()
            if len(bad):
                raise ValueError(f"log weights of image {size * len(parts) + bad[0].item()} are NaN or +inf: look at "
                                 "that image and at the networks' log variances there")
            parts.append({name: value.cpu() for name, value in _likelihoods(weights, bounds).items()})
            bar.update(len(x))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_sizes(n: int, samples: int, bounds: tuple[int, ...], rows: int) -> None:
    if not n:
        raise ValueError("there are no images to take the likelihood of")
    if samples < 1 or rows < 1:
        raise ValueError(f"samples and rows must be at least 1, got {samples} and {rows}")
    for k in bounds:
        if k < 1 or samples % k:
            raise ValueError(f"IWAE-{k} needs groups of {k} among {samples} samples: take a k that divides them")


def _weights(log_weights: Callable[[Tensor, int], Tensor], x: Tensor, samples: int, rows: int) -> Tensor:
    """log_weights(x, samples) in float64 [B, samples], asked for in parts of at most `rows` pairs."""
    found = []
    for done in range(0, samples, rows):
        k = min(rows, samples - done)
        part = log_weights(x, k)
        if part.shape != (len(x), k) or part.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"log weights of {len(x)} images x {k} draws must be float32 [{len(x)}, {k}], got "
                             f"{part.dtype} {list(part.shape)}")
        found.append(part.double())
    return torch.cat(found, 1)


def _likelihoods(weights: Tensor, bounds: tuple[int, ...]) -> dict[str, Tensor]:
    """The values of `log_likelihood` [B] from the log weights [B, samples], float64."""
    total = weights.logsumexp(1)
    found = {"log_likelihood": total - math.log(weights.shape[1]), "elbo": weights.mean(1)}
    for k in bounds:
        found[f"iwae_{k}"] = weights.unflatten(1, (-1, k)).logsumexp(2).mean(1) - math.log(k)
    return {**found, "ess": (2 * total - (2 * weights).logsumexp(1)).exp().nan_to_num(0.0)}


def _progress(images: int) -> tqdm:
    from lib.train import interactive
    return tqdm(total=images, desc="importance samples", unit="image", leave=False, disable=not interactive())


def active_units(means: Tensor, threshold: float = 0.01) -> dict:
    """Number of latent units whose posterior mean varies over the images by more than the threshold, as a metric.

    means [N, d]: E_q[z | x] of each image; active where Var_x of it > threshold (Burda et al. 2015, section 5, at 0.01;
    in units of the prior's variance only if that is 1). Raises ValueError: means that are not finite, not [N, d], or of
    fewer than two images.
    """
    if means.ndim != 2 or len(means) < 2:
        raise ValueError(f"active units need the means [N, d] of at least two images, got {list(means.shape)}")
    if not means.isfinite().all():
        raise ValueError("the posterior means are not finite: look at the images or the encoder they come from")
    return exact((means.detach().double().var(0) > threshold).sum(), "active units")
