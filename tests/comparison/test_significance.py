"""comparison/significance.py equals scipy and holds its error rates in simulations."""

import random

import pytest
from scipy import stats

from comparison import significance


def draws(seed, count, mean=0.0, deviation=1.0):
    generator = random.Random(seed)
    return [generator.gauss(mean, deviation) for _ in range(count)]


@pytest.mark.parametrize('freedom', [1, 2, 4, 9, 30.5])
def test_power_matches_noncentral_t(freedom):
    critical = stats.t.ppf(0.975, freedom)
    for ratio in (0.0, 0.5, 2.0, 5.0):
        expected = stats.nct.sf(critical, freedom, ratio) + stats.nct.cdf(-critical, freedom, ratio)
        assert significance.power(ratio, freedom, critical) == pytest.approx(expected, abs=1e-5)
    for comparisons in (1, 5):
        critical = stats.t.ppf(1 - 0.025 / comparisons, freedom)
        ratio = significance.detectable_ratio(freedom, comparisons)
        expected = stats.nct.sf(critical, freedom, ratio) + stats.nct.cdf(-critical, freedom, ratio)
        assert expected == pytest.approx(significance.POWER, abs=1e-4)


def test_mean_estimate():
    values = draws(1, 5, mean=3.0)
    estimate = significance.estimate_mean(values)
    low, high = stats.t.interval(0.95, 4, loc=estimate.mean, scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.deviation == pytest.approx(stats.tstd(values))
    assert significance.estimate_mean([2.5]) == significance.MeanEstimate(2.5, 1, None, None, None)


@pytest.mark.parametrize('count', [2, 3, 5, 12])
def test_paired_differences(count):
    baseline = draws(2, count)
    values = [b + d for b, d in zip(baseline, draws(3, count, 0.8, 0.5))]
    test = significance.paired_difference(list(zip(values, baseline)))
    expected = stats.ttest_rel(values, baseline)
    assert test.p_value == pytest.approx(expected.pvalue)
    for level in (0.9, 0.95, 0.99):
        low, high = expected.confidence_interval(level)
        assert test.interval(level) == pytest.approx((low, high, level))


@pytest.mark.parametrize('margin', [0.2, 0.8, 3.0])
def test_equivalence_is_two_one_sided_tests(margin):
    pairs = list(zip(draws(2, 6, 0.5, 0.4), draws(3, 6)))
    test = significance.paired_difference(pairs)
    difference_rows = [a - b for a, b in pairs]
    below = stats.ttest_1samp(difference_rows, margin, alternative='less').pvalue
    above = stats.ttest_1samp(difference_rows, -margin, alternative='greater').pvalue
    assert test.equivalence_p_value(margin) == pytest.approx(max(below, above))


def test_no_paired_test_for_too_few_or_equal_values():
    assert significance.paired_difference([(1.0, 2.0)]) is None
    assert significance.paired_difference([(1.5, 1.0), (2.5, 2.0)]) is None


def test_holm_correction():
    # By hand: 4 × 0.01, 3 × 0.02, 2 × 0.03 (not below the previous one), 1 × 0.04.
    assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert significance.holm([0.6, 0.9]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_holm_intervals_agree_with_p_values():
    draw = random.Random(3)
    for _ in range(300):
        tests = [
            significance.paired_difference(
                [(draw.gauss(draw.choice([0, 1, 3]), 1), draw.gauss(0, 1)) for _ in range(4)]
            )
            for _ in range(draw.randint(1, 6))
        ]
        p_values = [test.p_value for test in tests]
        levels = significance.holm_confidences(p_values)
        for test, corrected, level in zip(tests, significance.holm(p_values), levels):
            interval = test.interval(level)
            significant = corrected < significance.ALPHA
            assert significant == (interval.low > 0 or interval.high < 0)
            assert level >= significance.CONFIDENCE - 1e-12


def test_paired_test_error_rate_and_power():
    """A thousand experiments of five pairs: false positives, and hits at the detectable effect."""
    trials, count, spread = 1000, 5, 0.03
    generator = random.Random(5)

    def detection_rate(effect):
        hits = 0
        for _ in range(trials):
            seeds = [generator.gauss(2.0, 0.2) for _ in range(count)]  # shared by a pair
            pairs = [(s + effect + generator.gauss(0, spread), s) for s in seeds]
            hits += significance.paired_difference(pairs).p_value < significance.ALPHA
        return hits / trials

    error = spread / count**0.5
    effect = error * significance.detectable_ratio(count - 1)
    assert detection_rate(0.0) == pytest.approx(0.05, abs=0.02)  # three standard errors
    assert detection_rate(effect) == pytest.approx(significance.POWER, abs=0.04)
