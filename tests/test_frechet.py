"""Frechet distance and FID against pytorch-fid, closed forms, SciPy-free brute force, and the program on saved PNGs."""
import math

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance

from lib import evaluate
from lib.train import generator

DISTANCE = evaluate.frechet_distance


def normal(n, d, seed):
    return torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


def features(n, d, seed, decay=2.0):
    """Correlated features whose variances fall over `decay` decades."""
    g = generator(seed, use="mixing")
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d ** 0.5 * torch.logspace(0, -decay / 2, d).double()
    return normal(n, d, seed) @ mix + torch.randn(d, generator=g, dtype=torch.float64)


def with_moments(n, mean, covariance, seed):
    """Rows [n, d] whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def pytorch_fid(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b)]
    return float(calculate_frechet_distance(*moments[0], *moments[1]))


# ------------------------------------------------------------------------------------------------ the distance
@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 2), (300, 500, 3), (2000, 1500, 64), (600, 700, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distance_is_that_of_pytorch_fid(n, m, d, dtype):
    a, b = features(n, d, seed=1).to(dtype), features(m, d, seed=2).to(dtype)
    assert DISTANCE(a, b) == pytest.approx(pytorch_fid(a, b), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 64), (40, 400, 64), (65, 64, 64)])
def test_the_distance_is_that_of_pytorch_fid_also_of_singular_covariances(n, m, d):
    a, b = features(n, d, seed=1), features(m, d, seed=2)
    assert DISTANCE(a, b) == pytest.approx(pytorch_fid(a, b), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 64), (3, 2, 10), (40, 400, 64), (200, 300, 8), (9, 8, 1)])
def test_the_distance_is_that_of_the_centred_data_themselves(n, m, d):
    """Tr (A B)^(1/2) is the nuclear norm of X Y^T / sqrt((n-1)(m-1)), X and Y centred: no covariance, no root."""
    a, b = features(n, d, seed=3), features(m, d, seed=4)
    x, y = (a - a.mean(0)) / (n - 1) ** 0.5, (b - b.mean(0)) / (m - 1) ** 0.5
    overlap = torch.linalg.matrix_norm(x @ y.T, "nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * overlap
    assert DISTANCE(a, b) == pytest.approx(expected.item(), rel=1e-11)


def test_commuting_gaussians_have_the_closed_form():
    variances = torch.tensor([[4.0, 1.0, 0.25, 1e-6], [1.0, 9.0, 0.25, 1e-2]], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 2.0]], dtype=torch.float64)
    a, b = (with_moments(50, mean, v.diag(), seed) for seed, (mean, v) in enumerate(zip(means, variances, strict=True)))
    expected = (means[0] - means[1]).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    assert DISTANCE(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_gaussians_of_the_plane_that_do_not_commute_have_the_closed_form():
    """Tr (A B)^(1/2) = sqrt(Tr A B + 2 sqrt(det A B)) for 2 x 2 matrices."""
    a = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.9], [-0.9, 3.0]], dtype=torch.float64)
    overlap = math.sqrt((a @ b).trace() + 2 * math.sqrt(torch.det(a) * torch.det(b)))
    expected = 5.0 + a.trace().item() + b.trace().item() - 2 * overlap
    x = with_moments(30, torch.tensor([1.0, 2.0]).double(), a, seed=0)
    y = with_moments(70, torch.tensor([0.0, 0.0]).double(), b, seed=1)
    assert DISTANCE(x, y) == pytest.approx(expected, rel=1e-9)


def test_what_leaves_the_distance_alone_and_what_does_not():
    a, b = features(300, 16, seed=1), features(200, 16, seed=2)
    whole = DISTANCE(a, b)
    turn, _ = torch.linalg.qr(normal(16, 16, seed=3))
    assert DISTANCE(b, a) == pytest.approx(whole, rel=1e-11)
    assert DISTANCE(a[torch.randperm(300, generator=generator(0))], b) == pytest.approx(whole, rel=1e-11)
    assert DISTANCE(a @ turn + 5, b @ turn + 5) == pytest.approx(whole, rel=1e-9)
    assert DISTANCE(3 * a, 3 * b) == pytest.approx(9 * whole, rel=1e-11)
    assert DISTANCE(a + 2, a) == pytest.approx(16 * 4, rel=1e-11)
    assert DISTANCE(3 * a, a) == pytest.approx(4 * torch.cov(a.T).trace().item() + 4 * a.mean(0).square().sum().item())


def test_equal_features_are_at_distance_zero():
    for n, d in ((300, 16), (10, 64)):
        a = features(n, d, seed=1)
        assert 0 <= DISTANCE(a, a.clone()) < 1e-12
    constant = torch.ones(5, 3)
    assert DISTANCE(constant, constant) == 0 and DISTANCE(constant, constant + 2) == 12
    assert DISTANCE(constant, features(9, 3, seed=1)) > 0


# ------------------------------------------------------------------------------------------------ moments
@pytest.mark.parametrize("size", [1, 7, 100, 9000])
@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_moments_of_chunks_are_those_of_the_whole(size, blocks):
    x = features(9001, 5, seed=1)
    found, whole = evaluate.moments(iter(x.split(size)), blocks), evaluate.moments(x, blocks)
    for part in (found, whole):
        assert part.n == 9001 and part.counts.shape == (blocks,)
        np.testing.assert_allclose(part.mean, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(part.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(found.scatters, whole.scatters, rtol=1e-11, atol=1e-13)
    backwards = evaluate.moments(reversed(x.split(size)), blocks)
    torch.testing.assert_close(backwards.covariance, whole.covariance, rtol=1e-11, atol=1e-13)


def test_each_block_holds_every_so_many_th_row():
    x = features(5000, 4, seed=1)
    found = evaluate.moments(x.split(4099), blocks=3)
    for k in range(3):
        rows = x[k::3].numpy()
        assert found.counts[k] == len(rows)
        np.testing.assert_allclose(found.means[k], rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.scatters[k] / (len(rows) - 1), np.cov(rows, rowvar=False), rtol=1e-11)
        left = np.concatenate([x[j::3] for j in range(3) if j != k])
        np.testing.assert_allclose(found.without(k).covariance, np.cov(left, rowvar=False), rtol=1e-11)
        assert found.without(k).n == len(left)


def test_moments_keep_their_digits_far_from_the_origin():
    """Sums of squares would leave nothing of a variance of 1 beside a squared mean of 1e16."""
    x = features(5000, 3, seed=1)
    far = evaluate.moments((part + 1e8 for part in x.split(50)), blocks=4)
    np.testing.assert_allclose(far.covariance, torch.cov((x + 1e8).T), rtol=1e-7)


def test_float32_features_are_summed_in_float64():
    x = 1000 + features(20_000, 3, seed=1)
    found = evaluate.moments(x.float().split(100), blocks=1)
    np.testing.assert_allclose(found.covariance, np.cov(x.float().double().numpy(), rowvar=False), rtol=1e-11)
    assert found.means.dtype == found.scatters.dtype == torch.float64


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda: DISTANCE(torch.zeros(1, 3), torch.zeros(5, 3)), "at least two feature vectors, got 1"),
    (lambda: DISTANCE([], torch.zeros(5, 3)), "at least two feature vectors, got 0"),
    (lambda: DISTANCE(torch.zeros(5, 4), torch.zeros(5, 3)), "4 and 3 dimensions"),
    (lambda: DISTANCE([torch.zeros(5, 4), torch.zeros(5, 3)], torch.zeros(5, 3)), "all of one d"),
    (lambda: DISTANCE([torch.zeros(8192, 4), torch.zeros(5, 3)], torch.zeros(5, 3)), "all of one d"),
    (lambda: DISTANCE(torch.zeros(5), torch.zeros(5, 3)), r"must be \[n, d\].*got \[5\]"),
    (lambda: DISTANCE(torch.zeros(5, 3), torch.tensor([[0.0], [math.nan]])), "not finite"),
    (lambda: DISTANCE(torch.full((5, 3), math.inf), torch.zeros(5, 3)), "not finite"),
    (lambda: evaluate.moments(torch.zeros(5, 3), blocks=0), "at least one block, got 0")])
def test_what_has_no_distance_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ its error
def test_the_metric_is_the_delete_a_group_jackknife():
    """Against the formulas of Busing et al. on the rows themselves, with blocks of unequal size."""
    a, b, blocks = features(47, 3, seed=1), features(61, 3, seed=2), 5
    whole, bias, variance = DISTANCE(a, b), 0.0, 0.0
    for x, distance in ((a, lambda rows: DISTANCE(rows, b)), (b, lambda rows: DISTANCE(a, rows))):
        keep = torch.arange(len(x)) % blocks
        without = np.array([distance(x[keep != k]) for k in range(blocks)])
        h = len(x) / np.array([(keep == k).sum().item() for k in range(blocks)])
        corrected = blocks * whole - ((1 - 1 / h) * without).sum()
        bias += whole - corrected
        variance += ((h * whole - (h - 1) * without - corrected) ** 2 / (h - 1)).mean()
    found = evaluate.frechet(a, b, "FID", blocks)
    assert found == {"value": pytest.approx(whole), "se": pytest.approx(variance ** 0.5), "n": 47, "unit": "FID"}
    debiased = evaluate.frechet(a, b, "FID", blocks, debias=True)
    assert debiased["value"] == pytest.approx(whole - bias) and debiased["se"] == found["se"]
    assert {name: type(value) for name, value in found.items()} == {"value": float, "se": float, "n": int, "unit": str}


def test_the_error_is_the_spread_of_repeated_samples_and_the_bias_is_found():
    d, n, shift = 4, 200, 0.5
    truth = d * (shift ** 2 + (2 - 1) ** 2)
    pairs = [(normal(n, d, seed=2 * i), shift + 2 * normal(n, d, seed=2 * i + 1)) for i in range(120)]
    found = [evaluate.frechet(a, b, blocks=10) for a, b in pairs]
    values = np.array([metric["value"] for metric in found])
    debiased = np.array([evaluate.frechet(a, b, blocks=10, debias=True)["value"] for a, b in pairs])
    assert np.mean([metric["se"] for metric in found]) == pytest.approx(values.std(ddof=1), rel=0.2)
    own = debiased.std(ddof=1) / len(pairs) ** 0.5
    assert abs(debiased.mean() - truth) < 3 * own


def test_between_samples_of_one_distribution_only_the_bias_is_left_and_it_is_taken_away():
    pool = features(8000, 16, seed=5, decay=1)
    pairs = list(zip(pool[:4000].split(400), pool[4000:].split(400), strict=True))
    plain = np.array([evaluate.frechet(a, b)["value"] for a, b in pairs])
    debiased = np.array([evaluate.frechet(a, b, debias=True)["value"] for a, b in pairs])
    assert plain.min() > 0 and abs(debiased.mean()) < 0.1 * plain.mean()
    assert abs(debiased.mean()) < 3 * debiased.std(ddof=1) / len(pairs) ** 0.5 < 0.2 * plain.mean()


def test_moments_of_one_block_count_as_known_exactly():
    a, b = features(200, 3, seed=1), features(300, 3, seed=2)
    both = evaluate.frechet(a, b, blocks=10)
    one = [evaluate.frechet(evaluate.moments(a, 10), evaluate.moments(b, 1)),
           evaluate.frechet(evaluate.moments(a, 1), evaluate.moments(b, 10))]
    assert one[0]["value"] == pytest.approx(both["value"]) and all(0 < metric["se"] < both["se"] for metric in one)
    assert sum(metric["se"] ** 2 for metric in one) == pytest.approx(both["se"] ** 2)
    neither = evaluate.frechet(evaluate.moments(a, 1), evaluate.moments(b, 1))
    assert neither["se"] is None and neither["value"] == pytest.approx(DISTANCE(a, b))


def test_too_few_rows_for_an_error_have_none():
    b = features(50, 3, seed=2)
    assert evaluate.frechet(features(2, 3, seed=1), b)["se"] is None
    assert evaluate.frechet(features(3, 3, seed=1), b)["se"] > 0
