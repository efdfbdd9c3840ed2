"""Metrics against NumPy and naive float64 loops."""
import math

import numpy as np
import pytest
import torch

from lib import evaluate
from lib.train import generator


def normal(n, d, seed):
    return torch.randn(n, d, generator=generator(seed))


# ------------------------------------------------------------------------------------------------ numbers with errors
@pytest.mark.parametrize("n", [2, 5, 1000])
def test_an_estimate_is_the_mean_with_its_standard_error(n):
    samples = 1e4 + torch.randn(n, generator=generator(n))
    found = evaluate.estimate(samples, "nats per image")
    numbers = samples.numpy().astype(np.float64)
    assert found["value"] == pytest.approx(numbers.mean(), rel=1e-12)
    assert found["se"] == pytest.approx(numbers.std(ddof=1) / math.sqrt(n), rel=1e-9)
    assert (found["n"], found["unit"]) == (n, "nats per image")
    assert {name: type(value) for name, value in found.items()} == {"value": float, "se": float, "n": int, "unit": str}


def test_an_estimate_flattens_detaches_and_takes_integers():
    assert evaluate.estimate(torch.tensor([[1, 2], [3, 6]]), "x")["value"] == 3.0
    assert evaluate.estimate(torch.ones(3, requires_grad=True), "x") == {"value": 1.0, "se": 0.0, "n": 3, "unit": "x"}


def test_one_sample_has_no_error_and_none_no_mean():
    assert evaluate.estimate(torch.tensor([4.0]), "x") == {"value": 4.0, "se": None, "n": 1, "unit": "x"}
    with pytest.raises(ValueError, match="no samples"):
        evaluate.estimate(torch.tensor([]), "x")


@pytest.mark.parametrize("value", [3, 2.5, torch.tensor(2.5), np.float64(2.5)])
def test_an_exact_number_has_no_error(value):
    found = evaluate.exact(value, "bits")
    assert found == {"value": float(value), "se": None, "n": 1, "unit": "bits"} and type(found["value"]) is float


# ------------------------------------------------------------------------------------------------ kernels and MMD
def k(a, b, kind):
    """One kernel value in float64, from the two formulas of known fault 8."""
    mean = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True)) / len(a)
    return math.exp(-mean / len(a) if kind == "original" else -mean)


def naive_mmd(x, y, kind, unbiased):
    def mean(a, b, same):
        values = [k(p, q, kind) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and unbiased and i == j)]
        return sum(values) / len(values)
    return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)


@pytest.mark.parametrize("kind", evaluate.KERNELS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_mmd_agrees_with_a_naive_double_loop(kind, d):
    x, y = normal(23, d, seed=1), 0.5 + 2 * normal(17, d, seed=2)
    expected = naive_mmd(x, y, kind, False)
    assert evaluate.mmd(x.double(), y.double(), kind).item() == pytest.approx(expected, abs=1e-13)
    assert evaluate.mmd(x, y, kind).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", evaluate.KERNELS)
def test_the_unbiased_mmd_agrees_with_a_naive_double_loop_over_blocks(kind):
    x, y = normal(33, 2, seed=1), 0.5 + normal(31, 2, seed=2)
    shuffled = x[torch.randperm(33, generator=torch.Generator().manual_seed(0))]
    blocks = [naive_mmd(shuffled[i:i + 10], y[i:i + 10], kind, True) for i in (0, 10, 20)]
    found = evaluate.mmd_unbiased(x, y, kind, block=10)
    assert found["value"] == pytest.approx(np.mean(blocks), abs=1e-12) and found["n"] == 3
    assert found["se"] == pytest.approx(np.std(blocks, ddof=1) / 3 ** 0.5, abs=1e-12)


@pytest.mark.parametrize("kind", evaluate.KERNELS)
@pytest.mark.parametrize("d", [2, 8])
def test_mmd_of_equal_distributions_without_and_with_its_bias(kind, d):
    """Of two N(0, I): E k = (1 + 4 / scale)^(-d/2), scale d^2 or d, and the V-statistic has mean 2 (1 - E k) / n."""
    x, y, n = normal(20_000, d, seed=3), normal(20_000, d, seed=4), 100
    unbiased = evaluate.mmd_unbiased(x, y, kind, block=n)
    assert unbiased["n"] == 200 and abs(unbiased["value"]) < 3 * unbiased["se"]

    blocks = zip(x.double().split(n), y.double().split(n), strict=True)
    found = evaluate.estimate(torch.stack([evaluate.mmd(a, b, kind) for a, b in blocks]), "squared MMD")
    bias = 2 * (1 - (1 + 4 / (d * d if kind == "original" else d)) ** (-d / 2)) / n
    assert abs(found["value"] - bias) < 3 * found["se"] and bias > 10 * found["se"]


@pytest.mark.parametrize("kind", evaluate.KERNELS)
def test_mmd_of_distant_normals_is_the_closed_form(kind):
    """N(0, I) against N(m, I): E k(x, y) = (1 + 4/s)^(-d/2) exp(-|m|^2 / (s + 4)) with s = d^2 or d."""
    d, m = 2, 1.5
    x, y = normal(10_000, d, seed=5), normal(10_000, d, seed=6) + m
    scale = d * d if kind == "original" else d
    expected = 2 * (1 + 4 / scale) ** (-d / 2) * (1 - math.exp(-d * m * m / (scale + 4)))
    found = evaluate.mmd_unbiased(x, y, kind)
    assert found["n"] == 20 and abs(found["value"] - expected) < 3 * found["se"] < 0.1 * expected


def test_the_two_kernels_differ_by_the_second_division_by_d():
    x, y = normal(4, 3, seed=1), normal(5, 3, seed=2)
    torch.testing.assert_close(evaluate.kernel(x, y, "original") ** 3, evaluate.kernel(x, y, "gaussian"))
    assert evaluate.kernel(x, y).shape == (4, 5) and torch.equal(evaluate.kernel(x, x).diagonal(), torch.ones(4))


def test_mmd_passes_gradients():
    x = normal(8, 2, seed=1).requires_grad_()
    evaluate.mmd(x, normal(8, 2, seed=2)).backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_an_unknown_kernel_and_too_few_points_are_refused():
    x = normal(3, 2, seed=1)
    with pytest.raises(ValueError, match="unknown kernel 'laplace': use one of original, gaussian"):
        evaluate.mmd(x, x, "laplace")
    with pytest.raises(ValueError, match="at least two points of each kind, got 3 and 1"):
        evaluate.mmd_unbiased(x, x[:1])
    assert evaluate.mmd_unbiased(x, x[:2])["se"] is None


def test_the_unbiased_mmd_does_not_depend_on_the_order_of_the_data():
    """Blocks of sorted points would each be another distribution: the mean over them would be far too large."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4000, 2, generator=g), torch.randn(4000, 2, generator=g)
    found = evaluate.mmd_unbiased(x[x[:, 0].argsort()], y)
    assert abs(found["value"]) < 4 * found["se"] < 0.01
