"""Importance-sampled likelihoods against a model solved in closed form, and tables of weights; active units; pairs."""
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from lib import evaluate
from lib.train import generator

D, LATENT, IMAGES, SIGMA = 8, 3, 64, 0.5


# ------------------------------------------------------------------------------------------------ a solvable model
class PCA:
    """Probabilistic PCA, x = W z + mu + sigma eps and z ~ N(0, I), with q(z|x) off its posterior N(m, S).

    q = N(m + shift, widen * S): the exact posterior at 0 and 1. wrong: what its log weights leave out or turn round.
    log_weights computes in float32; log p(x) and the bound of q are closed forms in float64.
    """

    def __init__(self, shift=0.15, widen=1.6, seed=1, wrong=None):
        g = generator(0, use="weights")
        self.w, self.mu = torch.randn(D, LATENT, generator=g).double(), torch.randn(D, generator=g).double()
        inner = self.w.T @ self.w / SIGMA ** 2 + torch.eye(LATENT).double()
        self.posterior, self.shift, self.widen = inner.inverse(), shift, widen
        self.noise, self.wrong = generator(seed), wrong
        self.x = (torch.randn(IMAGES, LATENT, generator=g).double() @ self.w.T + self.mu
                  + SIGMA * torch.randn(IMAGES, D, generator=g).double()).float()

    def q(self, x):
        mean = (x.double() - self.mu) @ self.w @ self.posterior / SIGMA ** 2 + self.shift
        return MultivariateNormal(mean.float(), (self.widen * self.posterior).float())

    def log_weights(self, x, k):
        q = self.q(x)
        eps = torch.randn(len(x), k, LATENT, generator=self.noise)
        z = q.loc[:, None] + eps @ q.scale_tril[0].T
        log_q = q.expand((k, len(x))).log_prob(z.transpose(0, 1)).T
        log_p_z = Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_p_x = Normal(z @ self.w.T.float() + self.mu.float(), SIGMA).log_prob(x[:, None]).sum(-1)
        match self.wrong:
            case "no q":
                return log_p_x + log_p_z
            case "no prior":
                return log_p_x - log_q
            case "q turned":
                return log_p_x + log_p_z + log_q
            case "no constant":
                return log_p_x + D / 2 * math.log(2 * math.pi) + log_p_z - log_q
            case "a twentieth of a nat":
                return log_p_x + log_p_z - log_q + 0.05
        return log_p_x + log_p_z - log_q

    @property
    def log_p(self):
        covariance = self.w @ self.w.T + SIGMA ** 2 * torch.eye(D).double()
        return MultivariateNormal(self.mu, covariance).log_prob(self.x.double())

    @property
    def elbo(self):
        """log p(x) - KL(q || posterior): N(shift, widen * S) against N(0, S), the same for every x."""
        shift = torch.full((LATENT,), float(self.shift)).double()
        squared = shift @ self.posterior.inverse() @ shift
        return self.log_p - (LATENT * (self.widen - 1 - math.log(self.widen)) + squared).item() / 2


def errors_apart(found, expected, samples):
    """How many standard errors every estimate [N] is from the truth, by the delta method from the effective size."""
    se = (1 / found["ess"] - 1 / samples).sqrt()
    return (found["log_likelihood"] - expected) / se


def agrees(apart):
    """One standard normal per image: their mean and their mean square within 3 standard errors of 0 and 1."""
    n = len(apart)
    return abs(apart.mean()) < 3 / n ** 0.5 and abs(apart.square().mean() - 1) < 3 * (2 / n) ** 0.5


@pytest.mark.parametrize("rows", [700, 5000, 30_000])            # several parts an image, one, several images a part
def test_the_likelihood_of_probabilistic_pca_is_the_closed_form(rows):
    model = PCA()
    found = evaluate.log_likelihood(model.log_weights, model.x, rows=rows)
    assert agrees(errors_apart(found, model.log_p, 5000))
    off = evaluate.estimate(found["log_likelihood"] - model.log_p, "nats per image")
    assert abs(off["value"]) < 3 * off["se"] < 0.01
    assert all(value.dtype == torch.float64 and value.shape == (IMAGES,) for value in found.values())


@pytest.mark.parametrize("wrong", ["no q", "no prior", "q turned", "no constant", "a twentieth of a nat"])
def test_log_weights_that_leave_out_a_term_are_far_from_it(wrong):
    """The check above refuses them, by more than ten standard errors of the mean."""
    model = PCA(wrong=wrong)
    apart = errors_apart(evaluate.log_likelihood(model.log_weights, model.x, 2000), model.log_p, 2000)
    assert not agrees(apart) and abs(apart.mean()) > 10 / IMAGES ** 0.5


def test_the_error_of_an_estimate_is_the_spread_of_independent_ones():
    """sqrt(1/ess - 1/samples), by which the tests above measure, against 40 repetitions; and the bias, -variance/2."""
    model, samples = PCA(), 500
    runs = [evaluate.log_likelihood(model.log_weights, model.x, samples) for _ in range(40)]
    estimates = torch.stack([run["log_likelihood"] for run in runs])
    variance = torch.stack([1 / run["ess"] - 1 / samples for run in runs]).mean(0)
    assert estimates.var(0).mean() == pytest.approx(variance.mean().item(), rel=3 * (2 / 39 / IMAGES) ** 0.5)
    off = evaluate.estimate(estimates - model.log_p + variance / 2, "nats per image")
    assert abs(off["value"]) < 3 * off["se"] < 0.005


def test_the_exact_posterior_needs_one_sample():
    model = PCA(shift=0.0, widen=1.0)
    for samples in (1, 64):
        found = evaluate.log_likelihood(model.log_weights, model.x, samples, bounds=(1, samples))
        for name in ("log_likelihood", "elbo", "iwae_1", f"iwae_{samples}"):
            torch.testing.assert_close(found[name], model.log_p, rtol=0, atol=1e-4)
        torch.testing.assert_close(found["ess"], torch.full((IMAGES,), float(samples)).double())


# ------------------------------------------------------------------------------------------------ bounds
def test_the_bounds_rise_with_the_draws():
    """IWAE-1 <= IWAE-10 <= IWAE-5000 <= log p(x), each from draws of its own; IWAE-1 is the ELBO in closed form."""
    model = PCA(shift=0.2)
    ones = evaluate.log_likelihood(model.log_weights, model.x, 400)["elbo"]
    tens = evaluate.log_likelihood(model.log_weights, model.x, 400, bounds=[10])["iwae_10"]
    many = evaluate.log_likelihood(model.log_weights, model.x, 5000)["log_likelihood"]
    assert abs((off := evaluate.estimate(ones - model.elbo, "nats"))["value"]) < 3 * off["se"] < 0.05
    for low, high in ((ones, tens), (tens, many)):
        rise = evaluate.estimate(high - low, "nats per image")
        assert rise["value"] > 5 * rise["se"]
    over = evaluate.estimate(many - model.log_p, "nats per image")
    assert over["value"] < 3 * over["se"]


def test_the_bound_of_k_is_what_k_draws_alone_would_give():
    model = PCA(shift=0.3)
    grouped = evaluate.log_likelihood(model.log_weights, model.x, 2400, bounds=(8,))["iwae_8"]
    alone = torch.stack([evaluate.log_likelihood(model.log_weights, model.x, 8)["log_likelihood"] for _ in range(300)])
    apart = evaluate.estimate(grouped - alone.mean(0), "nats per image")
    assert abs(apart["value"]) < 3 * apart["se"] < 0.05
    assert alone.mean() - model.elbo.mean() > 0.3 and model.log_p.mean() - alone.mean() > 0.05    # neither of the ends


def test_on_the_same_draws_every_image_is_ordered():
    model = PCA()
    found = evaluate.log_likelihood(model.log_weights, model.x, 240, bounds=(1, 2, 12, 240), rows=7)
    names = ["iwae_1", "iwae_2", "iwae_12", "iwae_240"]
    assert list(found) == ["log_likelihood", "elbo", *names, "ess"]
    torch.testing.assert_close(found["iwae_1"], found["elbo"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found["iwae_240"], found["log_likelihood"], rtol=1e-12, atol=0)
    for low, high in zip(names, names[1:], strict=False):
        assert (found[low] < found[high]).all()


# ------------------------------------------------------------------------------------------------ tables of weights
class Table:
    """log_weights that reads the weights [N, samples] in order; images are the rows' numbers. largest: pairs a call."""

    def __init__(self, weights):
        self.weights, self.images = weights, torch.arange(len(weights)).view(-1, 1, 1)
        self.done, self.largest = torch.zeros(len(weights), dtype=torch.long), 0

    def __call__(self, x, k):
        own = x.flatten()
        self.largest = max(self.largest, len(own) * k)
        found = torch.stack([self.weights[i, self.done[i]:self.done[i] + k] for i in own])
        self.done[own] += k
        return found


def numpy_log_mean_exp(a, axis):
    """In float64, the largest taken out; -inf if all are."""
    top = a.max(axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(np.exp(a - top).mean(axis)) + top.squeeze(axis)
    return np.where(np.isneginf(top.squeeze(axis)), -np.inf, found)


def expected_of(weights, bounds=()):
    w = weights.double().numpy()
    p = np.exp(w - w.max(1, keepdims=True))
    found = {"log_likelihood": numpy_log_mean_exp(w, 1), "elbo": w.mean(1),
             "ess": p.sum(1) ** 2 / np.square(p).sum(1)}
    return found | {f"iwae_{k}": numpy_log_mean_exp(w.reshape(len(w), -1, k), 2).mean(1) for k in bounds}


@pytest.mark.parametrize("rows", [1, 7, 59, 60, 61, 125, 10_000, None])
def test_the_values_do_not_depend_on_the_parts(rows):
    """Every image is asked for all its draws; groups of 12 and 30 lie across the borders of 7, 59 and 61 rows."""
    table = Table(-100 + 3 * torch.randn(5, 60, generator=generator(1)))
    found = evaluate.log_likelihood(table, table.images, 60, bounds=(12, 30), rows=rows)
    expected = expected_of(table.weights, (12, 30))
    assert set(found) == set(expected) and table.done.tolist() == [60] * 5
    assert table.largest <= (rows or evaluate.ROWS["cpu"])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12)


@pytest.mark.parametrize(("images", "samples"), [(30, 3000), (2, 25_000), (30_000, 1)])
def test_a_call_is_never_asked_for_more_pairs_than_rows(images, samples):
    asked = []

    def log_weights(x, k):
        asked.append(len(x) * k)
        return torch.zeros(len(x), k)

    found = evaluate.log_likelihood(log_weights, torch.zeros(images, 1), samples, rows=10_000)
    assert 9000 <= max(asked) <= 10_000 and sum(asked) == images * samples
    assert torch.equal(found["log_likelihood"], torch.zeros(images).double())


@pytest.mark.parametrize("offset", [-1e4, 0.0, 300.0])
def test_a_million_weights_far_from_zero_keep_their_digits(offset):
    """Float32 sums would be off by 1e-4 nats and more at -1e4, exp(weight) itself would be 0, or inf at 300."""
    weights = offset + 2 * torch.randn(2, 10 ** 6, generator=generator(2))
    table = Table(weights)
    found = evaluate.log_likelihood(table, table.images, 10 ** 6, bounds=(10,), rows=300_000)
    for name, value in expected_of(weights, (10,)).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-8)
    if offset == -1e4:
        in_float32 = weights.logsumexp(1) - math.log(10 ** 6)
        assert (in_float32 - found["log_likelihood"]).abs().max() > 1e-5


def test_zero_weights_count_as_draws():
    weights = torch.randn(3, 40, generator=generator(3))
    weights[0, ::4] = -math.inf
    weights[2] = -math.inf
    table = Table(weights)
    found = evaluate.log_likelihood(table, table.images, 40, bounds=(4, 8))
    expected = expected_of(weights[:2], (4, 8))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][:2], value, rtol=1e-12)
    rest = weights[0][weights[0].isfinite()].double()
    assert found["log_likelihood"][0].item() == pytest.approx(rest.logsumexp(0).item() - math.log(40), rel=1e-12)
    assert {name: value[2].item() for name, value in found.items()} == {
        "log_likelihood": -math.inf, "elbo": -math.inf, "iwae_4": -math.inf, "iwae_8": -math.inf, "ess": 0.0}


def test_a_lone_heavy_weight_is_an_effective_sample_of_one():
    table = Table(torch.tensor([[0.0, -60.0, -60.0, -60.0], [5.0, 5.0, -math.inf, -math.inf]]))
    found = evaluate.log_likelihood(table, table.images, 4)
    np.testing.assert_allclose(found["ess"], [1, 2], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ the call
def test_gradients_are_off_and_products_full_whatever_the_caller_trains_in():
    seen, weight = [], torch.full((16, 1), 1 / 3, requires_grad=True)

    def log_weights(x, k):
        product = x @ weight
        seen.append((product.dtype, product.requires_grad))
        return product.expand(-1, k)

    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate.log_likelihood(log_weights, torch.ones(3, 16), 4)
    assert seen == [(torch.float32, False)] and torch.is_grad_enabled()
    np.testing.assert_allclose(found["log_likelihood"], [16 / 3] * 3, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_values_are_those_of_the_cpu():
    weights = -100 + 3 * torch.randn(50, 60, generator=generator(1))
    found = evaluate.log_likelihood(lambda x, k: weights.cuda()[x.flatten(), :k], torch.arange(50).cuda(), 60, (12,))
    for name, value in expected_of(weights, (12,)).items():
        assert not found[name].is_cuda
        np.testing.assert_allclose(found[name], value, rtol=1e-12)


def spoilt(value, image, draw=3):
    weights = torch.zeros(9, 10)
    weights[image, draw] = value
    return Table(weights)


@pytest.mark.parametrize("rows", [4, 10, 30, 1000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("image", [0, 5, 8])
def test_weights_that_are_no_numbers_name_their_image(value, image, rows):
    with pytest.raises(ValueError, match=f"log weights of image {image} are NaN or [+]inf"):
        evaluate.log_likelihood(table := spoilt(value, image), table.images, 10, rows=rows)


def zeros(x, k):
    return torch.zeros(len(x), k)


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda x: evaluate.log_likelihood(zeros, x[:0]), "no images"),
    (lambda x: evaluate.log_likelihood(zeros, x, 0), "samples and rows must be at least 1, got 0 and 1000"),
    (lambda x: evaluate.log_likelihood(zeros, x, 5, rows=0), "at least 1, got 5 and 0"),
    (lambda x: evaluate.log_likelihood(zeros, x, 5, bounds=(5, 2)), "groups of 2 among 5 samples"),
    (lambda x: evaluate.log_likelihood(zeros, x, 5, bounds=(0,)), "groups of 0 among 5 samples"),
    (lambda x: evaluate.log_likelihood(zeros, x, 5, bounds=(10,)), "groups of 10 among 5 samples"),
    (lambda x: evaluate.log_likelihood(lambda x, k: torch.zeros(k, len(x)), x, 5), r"float32 \[3, 5\], got.*\[5, 3\]"),
    (lambda x: evaluate.log_likelihood(lambda x, k: torch.zeros(len(x)), x, 1), r"float32 \[3, 1\], got.*\[3\]"),
    (lambda x: evaluate.log_likelihood(lambda x, k: zeros(x, k).bfloat16(), x, 1), "be float32.*got torch.bfloat16"),
    (lambda x: evaluate.active_units(x[:1]), r"at least two images, got \[1, 1\]"),
    (lambda x: evaluate.active_units(x[0]), r"means \[N, d\] of at least two images, got \[1\]"),
    (lambda x: evaluate.active_units(x / 0), "means are not finite"),
    (lambda x: evaluate.paired([1.0, 2.0], [1.0], "nats"), "as many numbers of each kind, got 2 and 1"),
    (lambda x: evaluate.paired([1.0], [1.0], "nats"), "at least two pairs, got 1"),
    (lambda x: evaluate.paired([1.0, 2.0], [1.0, math.nan], "nats"), "must be finite"),
    (lambda x: evaluate.paired([1.0, 2.0], [1.0, 2.0], "nats", 95), "between 0 and 1, got 95")])
def test_what_has_no_likelihood_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        call(torch.ones(3, 1))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ units and pairs
def test_active_units_are_those_whose_mean_varies():
    """Far from zero in float32 as well: a variance by squares would leave nothing of 0.011 beside 1e8."""
    unit = torch.randn(2000, 5, generator=generator(4), dtype=torch.float64)
    unit = (unit - unit.mean(0)) / unit.std(0)
    means = unit * torch.tensor([0.0, 0.009, 0.011, 1.0, 4.0]).sqrt()
    found = evaluate.active_units(means)
    assert found == {"value": 3.0, "se": None, "n": 1, "unit": "active units"}
    assert evaluate.active_units((means + 1000).float()) == found
    assert evaluate.active_units(means, threshold=0.5)["value"] == 2 and evaluate.active_units(means, 5)["value"] == 0


def test_paired_runs_have_students_interval():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(0.975; 2) = 4.302653 from its tables."""
    a, b = [11.0, 22.0, 33.0], [10.0, 20.0, 30.0]
    found, se = evaluate.paired(a, b, "nats per image"), 1 / math.sqrt(3)
    assert (found.pop("n"), found.pop("unit")) == (3, "nats per image")
    assert found == pytest.approx({"value": 2.0, "se": se, "low": 2 - 4.302653 * se, "high": 2 + 4.302653 * se})
    turned, half = evaluate.paired(b, a, "x"), evaluate.paired(a, b, "x", confidence=0.5)
    assert turned["value"] == -2 and turned["high"] == pytest.approx(-found["low"])
    assert half["high"] - half["value"] == pytest.approx(0.816497 * se, rel=1e-6)


def test_the_interval_covers_as_often_as_it_says():
    """What the seeds share cancels: pairs of large spread, and an interval of the small one."""
    noise = torch.randn(2, 1000, 4, generator=generator(5), dtype=torch.float64)
    b = 100 * noise[0]
    pairs = [evaluate.paired((b + 1 + 0.1 * noise[1])[i].tolist(), b[i].tolist(), "x", 0.9) for i in range(1000)]
    covered = sum(pair["low"] < 1 < pair["high"] for pair in pairs)
    assert abs(covered - 900) < 3 * 90 ** 0.5 and sum(pair["low"] > 0 for pair in pairs) > 990
