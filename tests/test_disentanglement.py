"""MIG and DCI of codes that are known to be entangled, or not to be: against scikit-learn and closed forms."""
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from lib import evaluate
from lib.shapes import shapes
from lib.train import generator

pytestmark = pytest.mark.filterwarnings("error")
NAMES = ("shape", "x", "y", "hue")


def factors(n, seed):
    """Independent, as those of `shapes`."""
    g = generator(seed)
    drawn = {"shape": torch.randint(0, 3, (n,), generator=g).float()}
    return drawn | {name: torch.rand(n, generator=g) for name in NAMES[1:]}


def known(n, seed, d=4):
    """Discrete factors, uniform and independent, that any bins can tell."""
    g = generator(seed)
    return {f"f{k}": torch.randint(0, 4, (n,), generator=g).float() for k in range(d)}


def as_code(found):
    return torch.stack(list(found.values()), 1)


def noise(n, d, seed):
    return torch.randn(n, d, generator=generator(seed, use="code"))


def values(metrics):
    return {name: metric["value"] for name, metric in metrics.items()}


# ------------------------------------------------------------------------------------------------ information
def naive_bins(x, bins):
    """As disentanglement_lib's histogram: numpy.digitize at the left edges."""
    return np.digitize(x, np.histogram(x, bins)[1][:-1])


@pytest.mark.parametrize("bins", [2, 20])
def test_the_information_is_scikit_learns_less_its_bias(bins):
    known_factors = factors(300, seed=1)
    codes = torch.stack([known_factors["x"] + 0.2 * noise(300, 1, 1)[:, 0], noise(300, 1, 2)[:, 0].exp()], 1).double()
    found = evaluate.mutual_information(codes, known_factors, bins)
    for name, own in known_factors.items():
        f = own.double().numpy()
        labels = f if name == "shape" and bins > 2 else np.searchsorted(np.quantile(f, np.arange(1, bins) / bins), f,
                                                                       side="right")
        for k in range(2):
            z = naive_bins(codes[:, k].numpy(), bins)
            pairs = {tuple(pair) for pair in zip(z, labels, strict=True)}
            bias = (len(pairs) - len(set(z)) - len(set(labels)) + 1) / 600
            assert found[name][k].item() == pytest.approx(mutual_info_score(z, labels) - bias, abs=1e-9)


def test_the_information_of_a_known_joint_distribution_is_its_closed_form():
    """A bit that is flipped with probability p tells log 2 - H(p) of the one before."""
    n, p = 40_000, 0.11
    g = generator(0)
    bit = torch.randint(0, 2, (n,), generator=g).float()
    seen = (bit - (torch.rand(n, generator=g) < p).float()).abs()
    truth = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    found = evaluate.mutual_information(seen[:, None], {"bit": bit})["bit"].item()
    assert found == pytest.approx(truth, abs=3 * math.sqrt(p * (1 - p) / n) * math.log((1 - p) / p))


def test_the_correction_removes_most_of_the_bias_where_nothing_is_told():
    z, f = noise(2000, 60, seed=1), torch.rand(2000, generator=generator(2))
    numbers = f.double().numpy()
    labels = np.searchsorted(np.quantile(numbers, np.arange(1, 20) / 20), numbers, side="right")
    plugin = np.mean([mutual_info_score(naive_bins(z[:, k].double().numpy(), 20), labels) for k in range(60)])
    corrected = evaluate.mutual_information(z, {"f": f})["f"].mean().item()
    assert plugin > 0.06 and abs(corrected) < 0.4 * plugin


# ------------------------------------------------------------------------------------------------ MIG
def test_the_factors_themselves_have_a_gap_of_one():
    found = evaluate.mig(as_code(known(2000, 1)), known(2000, 1))
    assert list(found) == ["mig", "mig_f0", "mig_f1", "mig_f2", "mig_f3"]
    for metric in found.values():
        assert set(metric) == {"value", "se", "n", "unit"} and metric["n"] == 2000 and metric["unit"] == "MIG"
        assert metric["value"] == pytest.approx(1, abs=0.006) and 0 < metric["se"] < 0.01


def test_continuous_factors_lose_a_little_to_the_edges_of_the_bins():
    small, large = (evaluate.mig(as_code(factors(n, 1)), factors(n, 1))["mig"]["value"] for n in (2000, 100_000))
    assert 0.85 < small < large < 1 and large > 0.97


def test_a_code_of_noise_has_no_gap():
    found = evaluate.mig(noise(2000, 10, seed=3), factors(2000, 1))
    for metric in found.values():
        assert 0 <= metric["value"] < 3 * metric["se"] < 0.03


def test_a_factor_told_twice_has_no_gap_and_a_rotated_code_a_small_one():
    code, own = as_code(known(1000, 1)), known(1000, 1)
    assert set(values(evaluate.mig(torch.cat([code, code], 1), own)).values()) == {0.0}
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator(5)))[0]
    assert evaluate.mig(code @ turn, own)["mig"]["value"] < 0.3


def test_what_leaves_the_gap_alone():
    code, own = as_code(factors(500, 1)) + 0.1 * noise(500, 4, 1), factors(500, 1)
    found = evaluate.mig(code, own)
    same = [evaluate.mig(code[:, [2, 0, 3, 1]], own), evaluate.mig(-3 * code.double() + 100, own),
            evaluate.mig(code.flip(0), {name: x.flip(0) for name, x in own.items()}),
            evaluate.mig(torch.cat([code, torch.ones(500, 3)], 1), own)]
    for other in same:
        for name in found:
            assert other[name]["value"] == pytest.approx(found[name]["value"], abs=0.01)
    assert values(same[0]) == pytest.approx(values(found)) and values(same[2]) == pytest.approx(values(found))


def test_one_dimension_alone_is_ahead_by_all_it_tells():
    own = known(800, 1, d=1)
    assert evaluate.mig(own["f0"][:, None], own)["mig"]["value"] == pytest.approx(1, abs=1e-9)


def test_the_gaps_standard_error_is_the_spread_of_repetitions():
    found = []
    for seed in range(50):
        own = factors(600, seed)
        found.append(evaluate.mig(as_code(own) + torch.tensor([0.4, 0.1, 0.2, 0.1]) * noise(600, 4, seed), own))
    for name in found[0]:
        spread = np.std([one[name]["value"] for one in found], ddof=1)
        assert 0.75 < np.mean([one[name]["se"] for one in found]) / spread < 1.45


# ------------------------------------------------------------------------------------------------ DCI
def scores(make, n=800, names=NAMES, blocks=1, **options):
    sets = [{name: x for name, x in factors(size, seed).items() if name in names} for size, seed in ((n, 1), (300, 2))]
    codes = [make(own, len(next(iter(own.values())))) for own in sets]
    return evaluate.dci(codes[0], sets[0], codes[1], sets[1], blocks=blocks, **options)


def smooth(own, n):
    """Each number a dimension, the class too, the circle two."""
    turn = 2 * math.pi * own["hue"]
    return torch.stack([own["shape"], own["x"], own["y"], turn.cos(), turn.sin()], 1)


def test_the_factors_themselves_are_disentangled_complete_and_told():
    found = scores(lambda own, n: as_code(own))
    assert list(found)[:3] == ["dci_disentanglement", "dci_completeness", "dci_informativeness"]
    assert all(set(metric) == {"value", "se", "n", "unit"} for metric in found.values())
    for name in list(found):
        assert found[name]["value"] == pytest.approx(1, abs=0.02), name
    assert found["dci_disentanglement"]["n"] == 800 and found["dci_accuracy_shape"]["n"] == 300
    assert "dci_accuracy_x" not in found


def test_a_circle_in_two_dimensions_is_disentangled_but_not_complete():
    found = scores(smooth)
    assert found["dci_disentanglement"]["value"] > 0.99
    assert found["dci_completeness"]["value"] == pytest.approx(1 - math.log(2) / math.log(5) / 4, abs=0.02)
    assert found["dci_informativeness_hue"]["value"] > 0.98


def test_factors_told_twice_are_disentangled_but_not_complete():
    found = scores(lambda own, n: torch.cat([as_code(own), as_code(own)], 1), names=("shape", "x", "y"))
    assert found["dci_disentanglement"]["value"] > 0.99
    assert found["dci_completeness"]["value"] == pytest.approx(1 - math.log(2) / math.log(6), abs=0.02)


def test_a_rotated_code_tells_as_much_but_is_entangled():
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator(5)))[0]
    scale = torch.tensor([0.8, 0.29, 0.29, 0.7, 0.7])
    straight, turned = (scores(lambda own, n, by=by: smooth(own, n) / scale @ by) for by in (torch.eye(5), turn))
    assert turned["dci_disentanglement"]["value"] < straight["dci_disentanglement"]["value"] - 0.4
    assert turned["dci_completeness"]["value"] < straight["dci_completeness"]["value"] - 0.3
    assert turned["dci_informativeness"]["value"] > 0.7


@pytest.mark.parametrize("d", [3, 30])
def test_a_code_of_noise_tells_nothing_and_scores_nothing(d):
    found = scores(lambda own, n: noise(n, d, seed=n))
    assert found["dci_disentanglement"]["value"] == found["dci_completeness"]["value"] == 0
    assert abs(found["dci_informativeness"]["value"]) < 0.05
    assert found["dci_accuracy_shape"]["value"] == pytest.approx(1 / 3, abs=4 * found["dci_accuracy_shape"]["se"])


def test_a_factor_that_is_not_told_counts_for_nothing():
    found = scores(lambda own, n: torch.cat([own["x"][:, None], noise(n, 4, seed=n)], 1))
    assert found["dci_disentanglement"]["value"] > 0.98 and found["dci_completeness"]["value"] > 0.98
    assert found["dci_informativeness_x"]["value"] > 0.98 > 0.05 > found["dci_informativeness_y"]["value"]


def test_noise_on_a_told_factor_and_spare_dimensions_change_little():
    """R^2 of x + e, both of variance v and w, is v / (v + w) at best."""
    found = scores(lambda own, n: torch.cat([(as_code(own) - 0.5) / 0.29 + 0.5 * noise(n, 3, seed=n),
                                             noise(n, 5, seed=n + 1)], 1), names=("x", "y", "shape"), classes=())
    assert found["dci_disentanglement"]["value"] > 0.85 and found["dci_completeness"]["value"] > 0.85
    assert found["dci_informativeness_x"]["value"] == pytest.approx(0.8, abs=0.06)
    assert "dci_accuracy_shape" not in found


def test_the_order_of_dimensions_and_the_run_do_not_matter():
    def mixed(own, n):
        return torch.cat([as_code(own) + 0.1 * noise(n, 4, seed=n), noise(n, 2, seed=n + 1)], 1)

    found = scores(mixed)
    assert scores(mixed) == found
    other = scores(lambda own, n: mixed(own, n)[:, [5, 2, 0, 3, 1, 4]])
    assert values(other) == pytest.approx(values(found), abs=0.02)


def test_standard_errors_of_dci():
    """Of informativeness: the spread over test sets; of the rest there is one if the parts are large enough."""
    def mixed(own, n):
        return (as_code(own) - 0.5) / 0.29 + 0.6 * noise(n, 2, seed=n)

    own, names, found = factors(1000, 1), ("x", "y"), []
    own = {name: own[name] for name in names}
    for seed in range(2, 14):
        test = {name: x for name, x in factors(300, seed).items() if name in names}
        code = (as_code(test) - 0.5) / 0.29 + 0.6 * noise(300, 2, seed)
        found.append(evaluate.dci(mixed(own, 1000), own, code, test, blocks=1))
    spread = np.std([one["dci_informativeness"]["value"] for one in found], ddof=1)
    assert 0.5 < np.mean([one["dci_informativeness"]["se"] for one in found]) / spread < 2
    assert found[0]["dci_disentanglement"]["se"] is None
    assert scores(smooth, n=399, blocks=4)["dci_completeness"]["se"] is None
    assert 0 < scores(mixed, n=400, names=names, blocks=4)["dci_disentanglement"]["se"] < 0.1


# ------------------------------------------------------------------------------------------------ both
def test_a_collapsed_code_scores_nothing_without_a_warning():
    own, test = factors(500, 1), factors(100, 2)
    for constant in (0.0, 0.3):
        codes = torch.full((500, 10), constant)
        found = evaluate.disentanglement(codes, own, codes[:100], test)
        for name in ("mig", *(f"mig_{name}" for name in NAMES), "dci_disentanglement", "dci_completeness"):
            assert found[name]["value"] == 0 == (found[name]["se"] or 0)
        assert all(math.isfinite(metric["value"]) for metric in found.values())
        assert abs(found["dci_informativeness"]["value"]) < 0.05


def test_the_factors_of_the_shapes_are_scored_but_for_the_angle():
    sets = [shapes(n, seed)[1] for n, seed in ((450, 1), (100, 2))]
    found = evaluate.disentanglement(as_code(sets[0]), sets[0], as_code(sets[1]), sets[1])
    told = ("shape", "x", "y", "radius", "hue", "ground")
    expected = {"mig", *(f"mig_{name}" for name in told), "dci_disentanglement", "dci_completeness",
                "dci_informativeness", *(f"dci_informativeness_{name}" for name in told), "dci_accuracy_shape"}
    assert set(found) == expected
    assert found["dci_disentanglement"]["value"] > 0.95 and found["mig"]["value"] > 0.6
    with_angle = evaluate.disentanglement(as_code(sets[0]), sets[0], as_code(sets[1]), sets[1], leave_out=("x", "y"))
    assert "mig_angle" in with_angle and "mig_x" not in with_angle


def test_scores_are_numbers_to_be_stored():
    import json
    own, test = factors(450, 1), factors(60, 2)
    found = evaluate.disentanglement(as_code(own).requires_grad_(), own, as_code(test), test)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(type(one["value"]) is float and type(one["n"]) is int for one in found.values())


@pytest.mark.parametrize(("call", "complaint"), [
    (lambda z, f: evaluate.mig(z[:, 0], f), r"codes must be \[N, d\] of at least two images, got \[40\]"),
    (lambda z, f: evaluate.mig(z[:1], {"a": f["x"][:1]}), r"at least two images, got \[1, 2\]"),
    (lambda z, f: evaluate.mig(z[:, :0], f), r"got \[40, 0\]"),
    (lambda z, f: evaluate.mig(z / 0, f), "codes are not finite"),
    (lambda z, f: evaluate.mig(z, f, bins=1), "at least two bins are needed, got 1"),
    (lambda z, f: evaluate.mig(z, {}), "no factor"),
    (lambda z, f: evaluate.mig(z, {"x": f["x"][:-1]}), r"factor x must be 40 finite numbers.*got \[39\]"),
    (lambda z, f: evaluate.mig(z, {"x": f["x"] * math.nan}), "factor x must be 40 finite numbers"),
    (lambda z, f: evaluate.mig(z, {"x": torch.ones(40)}), "factor x has one value only: leave it out"),
    (lambda z, f: evaluate.dci(z, {"x": torch.ones(40)}, z, {"x": f["x"]}), "factor x does not vary: leave it out"),
    (lambda z, f: evaluate.dci(z, {"x": f["x"]}, z, {"x": torch.ones(40)}), "factor x does not vary: leave it out"),
    (lambda z, f: evaluate.dci(z, f, z[:, :1], f), "2 and 1 dimensions"),
    (lambda z, f: evaluate.dci(z, f, z, {"x": f["x"]}), "the same dimensions and factors"),
    (lambda z, f: evaluate.dci(z, f, z / 0, f), "codes are not finite")])
def test_what_cannot_be_scored_is_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        call(noise(40, 2, 1), factors(40, 1))
    assert "\n" not in str(error.value)
