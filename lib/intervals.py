"""Means with 95 % intervals (Student's t): of several seeds, of one run's items, of paired differences."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """`mean` ± `half` (None if nothing tells it), the half-width of its 95 % interval, from `n` values.

    deviation: the standard deviation of the values, None for a single one.
    """
    mean: float
    half: float | None
    n: int
    deviation: float | None = None

    @property
    def low(self) -> float:
        """The interval's lower end; minus infinity where there is none."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end; infinity where there is none."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def effect(self) -> float | None:
        """The mean in standard deviations: Cohen's d_z of paired differences. None if they do not vary."""
        return self.mean / self.deviation if self.deviation else None

    def text(self, digits: int = 4) -> str:
        """"m ± h" to the second digit of the half-width; without one, or one of 0, the mean to `digits` decimals."""
        if self.half:
            digits = max(0, min(9, 1 - math.floor(math.log10(self.half))))
        return f"{self.mean:.{digits}f}".replace("-", "−") + (f" ± {self.half:.{digits}f}" if self.half else "")


def quantile(n: int) -> float:
    """From a standard error to a half-width, for n values: t of n - 1 degrees of freedom. ValueError: n < 2."""
    if n < 2:
        raise ValueError(f"an interval needs two values, got {n}")
    from scipy.special import stdtrit  # lighter to import than scipy.stats
    return float(stdtrit(n - 1, 0.5 + LEVEL / 2))


def of_values(values: Sequence[float]) -> Interval:
    """The interval of the mean of independent values; of a single value the half-width is None."""
    n = len(values)
    if n < 2:
        return Interval(values[0], None, n)
    deviation = stdev(values)
    return Interval(mean(values), quantile(n) * deviation / math.sqrt(n), n, deviation)


def of_error(value: float, se: float | None, n: int) -> Interval:
    """The interval of a mean over n items whose standard error is known; None where there is no error."""
    return Interval(value, None if se is None or n < 2 else quantile(n) * se, n)


def of_effect(interval: Interval) -> tuple[float, float, float] | None:
    """(low, d, high): the mean in standard deviations, Cohen's d_z of paired differences, with its own 95 % interval.

    The interval inverts the noncentral t distribution of d * sqrt(n) (Steiger and Fouladi 1997). None if d is.
    """
    if interval.effect is None:
        return None
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import gammaincinv, ndtr
    freedom, root_n = interval.n - 1, math.sqrt(interval.n)
    spread = np.sqrt(2 * gammaincinv(freedom / 2, (np.arange(4000) + 0.5) / 4000) / freedom)    # of s / sigma
    scaled = interval.effect * root_n * spread

    def end(probability):                              # scipy.stats.nct is NaN far from its centre
        return brentq(lambda centre: ndtr(scaled - centre).mean() - probability,
                      scaled.min() - 9, scaled.max() + 9) / root_n
    return end(0.5 + LEVEL / 2), interval.effect, end(0.5 - LEVEL / 2)


def of_metric(metric: dict) -> Interval:
    """The interval of one run's metric {"value", "se", "n", "unit"} over its n items."""
    return of_error(metric["value"], metric["se"], metric["n"])


def of_pairs(first: dict, second: dict) -> Interval | None:
    """The interval of first - second over the keys that both have (seeds, settings); None if they share none."""
    shared = [first[key] - second[key] for key in first if key in second]
    return of_values(shared) if shared else None
