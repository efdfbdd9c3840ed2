"""Do single dimensions of a code stand for single factors? MIG and DCI, where the factors are known. See `evaluate`.

means [N, d] are the codes of N images, factors {name: [N]} what the images were made from. The codes are usually the
means of q(z|x), as in Locatello et al. 2019. Neither score sees their scale: a dimension that has all but collapsed
counts by the little it still says. Draws of q(z|x) in place of the means count only what survives the encoder's noise.
"""
import numpy as np
import torch
from torch import Tensor

CLASSES = ("shape",)                          # of the factors of data.shapes, those without an order,
PERIODS = {"hue": 1.0, "ground": 1.0}         # those that come round again,
UNKNOWABLE = ("angle",)                       # and the one that not even the images tell
TREES, LEAF = 50, 20


# ------------------------------------------------------------------------------------------------ MIG
def mig(means: Tensor, factors: dict[str, Tensor], bins: int = 20) -> dict[str, dict]:
    """Mutual information gap as metrics: "mig", the mean over the factors, and "mig_<factor>" of each.

    Chen, Li, Grosse and Duvenaud 2018, section 4: what the code's dimension that tells most of a factor tells of it,
    less what the second-best does, over the factor's entropy; 1 if one dimension tells all and the others nothing, 0
    if no dimension is ahead. A code of one dimension has a second that tells nothing.
    As disentanglement_lib (Locatello et al. 2019), codes fall into `bins` bins of equal width between their extremes.
    Factors of at most `bins` values are taken as they are, others fall into `bins` bins of equal frequency; where such
    a circle is cut does not matter. The information is estimated as by `mutual_information`. se: over images, of the
    plug-in gap's linearisation; it holds the binning and the two dimensions for given.

    Raises ValueError: as `mutual_information`; a factor with one value only.
    """
    codes, labels = _binned(means, bins), _labels(factors, len(means), bins)
    gaps, terms = {}, []
    for name, own in labels.items():
        entropy, surprise = (x[..., 0] for x in _information(own[:, None], own))
        if not entropy > 0:
            raise ValueError(f"factor {name} has one value only: leave it out")
        found, pointwise = _information(np.pad(codes, ((0, 0), (0, 1))), own)    # the last dimension tells nothing
        first, second = found.argsort(kind="stable")[::-1][:2]
        gaps[name] = (found[first] - found[second]) / entropy
        terms.append((pointwise[:, first] - pointwise[:, second] - gaps[name] * surprise) / entropy)
    metrics = {"mig": _metric(np.mean(list(gaps.values())), np.mean(terms, 0), "MIG")}
    return metrics | {f"mig_{name}": _metric(gaps[name], own, "MIG") for name, own in zip(gaps, terms, strict=True)}


def mutual_information(means: Tensor, factors: dict[str, Tensor], bins: int = 20) -> dict[str, Tensor]:
    """Mutual information of each dimension with each factor, {factor: float64 [d]} in nats; bins as of `mig`.

    Plug-in estimate less its bias to first order, (occupied pairs - values - values + 1) / 2N (Miller 1955): at 20 x 20
    bins and no information the plug-in is 0.043 too large at N = 4,096. It can be slightly negative; of a dimension
    that is constant it is 0.
    Raises ValueError: means not [N, d] or of fewer than two images, factors of another length or none, values that are
    not finite, fewer than two bins.
    """
    codes = _binned(means, bins)
    return {name: torch.from_numpy(_information(codes, own)[0])
            for name, own in _labels(factors, len(means), bins).items()}


def _information(codes: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mutual information [d] of codes [N, d] with labels [N], the pointwise terms [N, d] that plug-in averages)."""
    n, d = codes.shape
    values, size = codes.max() + 1, own.max() + 1
    cells = (np.arange(d) * values + codes) * size + own[:, None]
    joint = np.bincount(cells.ravel(), minlength=d * values * size).reshape(d, values, size)
    given, labels = joint.sum(2), joint.sum(1)
    pointwise = np.log(n * joint.ravel()[cells] / given[np.arange(d), codes] / labels[np.arange(d), own[:, None]])
    excess = (joint > 0).sum((1, 2)) - (given > 0).sum(1) - (labels > 0).sum(1) + 1
    return pointwise.mean(0) - excess / (2 * n), pointwise


def _binned(means: Tensor, bins: int) -> np.ndarray:
    """Bins of equal width between each dimension's extremes: integers [N, d], 0 throughout if it is constant."""
    if bins < 2:
        raise ValueError(f"at least two bins are needed, got {bins}")
    x = _codes(means)
    low, width = x.min(0), np.ptp(x, 0)
    scaled = np.divide(x - low, width, out=np.zeros_like(x), where=width > 0)
    return np.minimum((scaled * bins).astype(np.int64), bins - 1)


def _labels(factors: dict[str, Tensor], n: int, bins: int) -> dict[str, np.ndarray]:
    """Each factor as integers [N] from 0: its values if they are few, else bins of equal frequency."""
    found = {}
    for name, own in _numbers(factors, n).items():
        values, labels = np.unique(own, return_inverse=True)
        if len(values) > bins:
            labels = np.searchsorted(np.quantile(own, np.arange(1, bins) / bins), own, side="right")
        found[name] = labels
    return found


# ------------------------------------------------------------------------------------------------ DCI
def dci(means: Tensor, factors: dict[str, Tensor], test_means: Tensor, test_factors: dict[str, Tensor],
        classes: tuple[str, ...] = CLASSES, periods: dict[str, float] = PERIODS, blocks: int = 4) -> dict[str, dict]:
    """Disentanglement, completeness and informativeness as metrics (Eastwood and Williams 2018, section 2).

    A forest of extremely randomised trees (50, leaves of 20 images at least) predicts each factor from the code:
    numbers as they are, those in `periods` as cosine and sine, `classes` as one-hot vectors.
    "dci_informativeness_<factor>": R^2 on the test images, the share of the vector's variance predicted (of a class,
    the Brier skill score), "dci_accuracy_<class>" the share of test images whose class is voted for, and
    "dci_informativeness" the mean R^2, negative ones taken as they are; se over test images.
    "dci_disentanglement", "dci_completeness": with R_ij the share of factor j's variance that its forest finds in
    dimension i, 1 less the entropy of a dimension's row over its maximum, log of the number of factors, and of a
    factor's column, over log d; means weighted by the sums of rows and of columns. A column sums to the factor's R^2,
    and to 0 if that is not above twice its se: a factor that the code does not tell counts for nothing, as with the
    weights of the source's lasso. Both are 0 if no factor is told, and 1 for the entropy of one thing. A circle needs
    two dimensions, or one that is torn, so its completeness is below 1 in a smooth code.
    se of those two: over `blocks` disjoint parts of the training images, a forest each; None if a part has fewer than
    100. Deterministic.

    Raises ValueError: as `mutual_information`, of either set; sets of different factors or dimensions; a factor that
    does not vary in one of them.
    """
    train, test = _codes(means), _codes(test_means)
    known, held = _numbers(factors, len(train)), _numbers(test_factors, len(test))
    if train.shape[1] != test.shape[1] or set(known) != set(held):
        raise ValueError(f"training and test codes must have the same dimensions and factors, got {train.shape[1]} and "
                         f"{test.shape[1]} dimensions, {', '.join(known)} and {', '.join(held)}")
    targets = {name: _targets(name, own, held[name], classes, periods) for name, own in known.items()}
    table, metrics, influences = _forests(train, test, targets, classes)
    mean = np.mean([metrics[f"dci_informativeness_{name}"]["value"] for name in targets])
    order = np.random.default_rng(0).permutation(len(train))
    parts = [order[k::blocks] for k in range(blocks)] if len(train) >= 100 * blocks > 100 else []
    by_part = [_entropies(_forests(train[at], test, {name: (own[at], other) for name, (own, other) in targets.items()},
                                   classes)[0]) for at in parts]
    scores = {}
    for k, (name, value) in enumerate(zip(("disentanglement", "completeness"), _entropies(table), strict=True)):
        se = float(np.std([found[k] for found in by_part], ddof=1) / len(parts) ** 0.5) if parts else None
        scores[f"dci_{name}"] = {"value": value, "se": se, "n": len(train), "unit": f"DCI {name}"}
    return scores | {"dci_informativeness": _metric(mean, np.mean(influences, 0), "R2")} | metrics


def _forests(train: np.ndarray, test: np.ndarray, targets: dict, classes: tuple[str, ...]) -> tuple:
    """(importances [d, factors], metrics of each factor, the influence [test images] of each on its R^2)."""
    from sklearn.ensemble import ExtraTreesRegressor
    columns, metrics, influences = [], {}, []
    for name, (own, other) in targets.items():
        forest = ExtraTreesRegressor(TREES, min_samples_leaf=LEAF, random_state=0)
        forest.fit(train, own if own.shape[1] > 1 else own[:, 0])
        found = forest.predict(test).reshape(other.shape)
        error, spread = ((other - found) ** 2).sum(1), ((other - other.mean(0)) ** 2).sum(1)
        r2 = 1 - error.mean() / spread.mean()
        influences.append(((1 - r2) * spread - error) / spread.mean())
        metric = metrics[f"dci_informativeness_{name}"] = _metric(r2, influences[-1], "R2")
        columns.append(forest.feature_importances_ * (r2 if r2 > 2 * metric["se"] else 0.0))
        if name in classes:
            right = (other.argmax(1) == found.argmax(1)).astype(float)
            metrics[f"dci_accuracy_{name}"] = _metric(right.mean(), right, "accuracy")
    return np.stack(columns, 1), metrics, influences


def _entropies(table: np.ndarray) -> list[float]:
    """[disentanglement, completeness] of importances [d, factors]; both 0 if nothing is important."""
    scores = []
    for rows in (table, table.T):
        sums = rows.sum(1, keepdims=True)
        share = np.divide(rows, sums, out=np.zeros_like(rows), where=sums > 0)
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1) / np.log(max(rows.shape[1], 2))
        scores.append(float((1 - entropy) @ sums[:, 0] / table.sum()) if table.sum() > 0 else 0.0)
    return scores


def _targets(name: str, own: np.ndarray, other: np.ndarray, classes: tuple[str, ...],
             periods: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """The factor of the training and of the test images as vectors [N, k] to be predicted."""
    if own.min() == own.max() or other.min() == other.max():
        raise ValueError(f"factor {name} does not vary: leave it out")
    if name in classes:
        values = np.unique(np.concatenate([own, other]))
        return tuple((x[:, None] == values).astype(float) for x in (own, other))
    if name in periods:
        return tuple(np.stack([np.cos(x), np.sin(x)], 1) for x in (2 * np.pi / periods[name] * y for y in (own, other)))
    return own[:, None], other[:, None]


# ------------------------------------------------------------------------------------------------ both
def disentanglement(means_train: Tensor, factors_train: dict[str, Tensor], means_test: Tensor,
                    factors_test: dict[str, Tensor], leave_out: tuple[str, ...] = UNKNOWABLE, bins: int = 20,
                    **options) -> dict[str, dict]:
    """`mig` of the training codes and `dci` of both as one dict of metrics to store; options: of `dci`.

    angle of data.shapes is left out: a disc has none, a square's comes round at pi/2 and a triangle's at 2 pi/3, so
    that no code of an image can tell it. Raises ValueError as those two do.
    """
    known, held = ({name: own for name, own in factors.items() if name not in leave_out}
                   for factors in (factors_train, factors_test))
    return mig(means_train, known, bins) | dci(means_train, known, means_test, held, **options)


def _codes(means: Tensor) -> np.ndarray:
    """float64 [N, d]. ValueError: other shapes, fewer than two images, no dimension, values that are not finite."""
    if means.ndim != 2 or len(means) < 2 or not means.shape[1]:
        raise ValueError(f"codes must be [N, d] of at least two images, got {list(means.shape)}")
    if not means.isfinite().all():
        raise ValueError("the codes are not finite: look at the images or the encoder they come from")
    return means.detach().double().cpu().numpy()


def _numbers(factors: dict[str, Tensor], n: int) -> dict[str, np.ndarray]:
    """{factor: float64 [n]}. ValueError: none, others than [n], values that are not finite."""
    if not factors:
        raise ValueError("there is no factor to compare the codes with")
    for name, own in factors.items():
        if own.shape != (n,) or not own.isfinite().all():
            raise ValueError(f"factor {name} must be {n} finite numbers, one for each code, got {list(own.shape)}")
    return {name: own.detach().double().cpu().numpy() for name, own in factors.items()}


def _metric(value: float, terms: np.ndarray, unit: str) -> dict:
    """A number that is, to first order, a mean of terms [n], as a metric."""
    return {"value": float(value), "se": float(terms.std(ddof=1) / len(terms) ** 0.5), "n": len(terms), "unit": unit}
