import math

import numpy as np
import pytest
import scipy.stats

from lib import intervals

VALUES = [2.0, 3.5, 1.0, 4.0]


def test_the_interval_of_a_mean_is_students():
    found = intervals.of_values(VALUES)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(VALUES), scipy.stats.sem(VALUES))
    assert (found.low, found.high) == pytest.approx((low, high)) and found.n == 4


def test_it_covers_the_truth_in_95_of_100_experiments():
    draws = np.random.default_rng(1).normal(size=(4000, 3))
    covered = np.mean([found.low < 0 < found.high for found in map(intervals.of_values, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


def test_one_value_has_no_interval():
    found = intervals.of_values([3.0])
    assert (found.mean, found.half, found.low, found.high, found.effect) == (3.0, None, -math.inf, math.inf, None)


def test_a_known_error_over_many_items_is_nearly_the_normal_interval():
    assert intervals.of_error(1.0, 0.1, 10**6).half == pytest.approx(0.1 * scipy.stats.norm.ppf(0.975), rel=1e-4)
    assert intervals.of_error(1.0, None, 10).half is None


def test_pairs_are_compared_where_both_sides_are():
    found = intervals.of_pairs({1: 5.0, 2: 7.0, 4: 0.0}, {1: 4.0, 2: 4.0, 3: 9.0})
    test = scipy.stats.ttest_rel([5.0, 7.0], [4.0, 4.0]).confidence_interval()
    assert (found.low, found.high) == pytest.approx((test.low, test.high)) and found.n == 2
    assert found.effect == pytest.approx(2 / math.sqrt(2))
    assert intervals.of_pairs({1: 1.0}, {2: 1.0}) is None


def test_an_interval_of_one_value_is_refused():
    with pytest.raises(ValueError, match="two values"):
        intervals.quantile(1)


@pytest.mark.parametrize("values", [[4.9, 4.8, 5.0], [0.1, -0.1, 0.3], [-3.0, -1.0], [1.0, 2.0, 4.0, 3.0, 1.5]])
def test_an_effect_size_has_the_interval_of_the_noncentral_t(values):
    low, d, high = intervals.of_effect(intervals.of_values(values))
    n, t = len(values), scipy.stats.ttest_1samp(values, 0).statistic
    assert d == pytest.approx(t / math.sqrt(n)) and low < d < high
    for end, probability in ((low, 0.975), (high, 0.025)):
        known = scipy.stats.nct.cdf(t, n - 1, end * math.sqrt(n))
        assert math.isnan(known) or known == pytest.approx(probability, abs=2e-3)


def test_an_effect_of_the_other_sign_is_its_mirror_image_and_none_without_scatter():
    low, d, high = intervals.of_effect(intervals.of_values(VALUES))
    assert intervals.of_effect(intervals.of_values([-v for v in VALUES])) == pytest.approx((-high, -d, -low))
    assert intervals.of_effect(intervals.of_values([1.0])) is None
