"""evidence.py: against scipy, and by simulation."""

import random

import evidence
import pytest
from scipy import stats


def draws(seed, count, mean=0.0, deviation=1.0):
    generator = random.Random(seed)
    return [generator.gauss(mean, deviation) for _ in range(count)]


@pytest.mark.parametrize('freedom', [1, 2, 3.7, 8, 40, 1000])
def test_students_distribution(freedom):
    for t in (0.0, 0.01, 0.7, 2.1, 12.0, 300.0):
        assert evidence.student_tail(t, freedom) == pytest.approx(
            stats.t.sf(t, freedom), rel=1e-10, abs=1e-290
        )
    for probability in (0.5, 0.6, 0.9, 0.975, 0.9999):
        assert evidence.student_quantile(probability, freedom) == pytest.approx(
            stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize('freedom', [1, 2, 4, 9, 30.5])
def test_the_power_is_that_of_the_noncentral_distribution(freedom):
    critical = stats.t.ppf(0.975, freedom)
    for ratio in (0.0, 0.5, 2.0, 5.0):
        expected = stats.nct.sf(critical, freedom, ratio) + stats.nct.cdf(-critical, freedom, ratio)
        assert evidence.power(ratio, freedom, critical) == pytest.approx(expected, abs=1e-5)
    for comparisons in (1, 5):
        critical = stats.t.ppf(1 - 0.025 / comparisons, freedom)
        ratio = evidence.detectable_ratio(freedom, comparisons)
        expected = stats.nct.sf(critical, freedom, ratio) + stats.nct.cdf(-critical, freedom, ratio)
        assert expected == pytest.approx(evidence.POWER, abs=1e-4)


def test_an_estimate():
    values = draws(1, 5, mean=3.0)
    found = evidence.estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.deviation == pytest.approx(stats.tstd(values))
    assert evidence.estimate([2.5]) == evidence.Estimate(2.5, 1, None, None, None)


@pytest.mark.parametrize('count', [2, 3, 5, 12])
def test_paired_and_unpaired_differences(count):
    baseline = draws(2, count)
    values = [b + d for b, d in zip(baseline, draws(3, count, 0.8, 0.5))]
    found, expected = (
        evidence.paired_difference(list(zip(values, baseline))),
        stats.ttest_rel(values, baseline),
    )
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))

    others = draws(4, count + 1, 0.3, 2.0)
    found, expected = (
        evidence.unpaired_difference(values, others),
        stats.ttest_ind(values, others, equal_var=False),
    )
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_too_few_values_for_a_test():
    with pytest.raises(ValueError, match='two pairs'):
        evidence.paired_difference([(1.0, 2.0)])
    with pytest.raises(ValueError, match='two values'):
        evidence.unpaired_difference([1.0, 2.0], [1.0])


def test_values_that_repeat_one_another():
    assert evidence.paired_difference([(1.0, 1.0), (2.0, 2.0)]).p_value == 1.0
    assert evidence.paired_difference([(1.5, 1.0), (2.5, 2.0)]).p_value == 0.0
    same = evidence.unpaired_difference([1.0, 1.0], [1.0, 1.0])
    assert (same.p_value, same.detectable()) == (1.0, 0.0)


def test_holms_correction():
    # By hand: 4 × 0.01, 3 × 0.02, 2 × 0.03 (not below the one before), 1 × 0.04.
    assert evidence.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert evidence.holm([0.6, 0.9]) == [1.0, 1.0]
    assert evidence.holm([]) == []


def test_no_difference_is_found_as_often_as_is_said_and_a_known_one_too():
    """A thousand experiments of five pairs: false positives, and hits at the detectable effect."""
    trials, count, spread = 1000, 5, 0.03
    generator = random.Random(5)

    def found(effect):
        hits = 0
        for _ in range(trials):
            seeds = [generator.gauss(2.0, 0.2) for _ in range(count)]  # shared by a pair
            pairs = [(s + effect + generator.gauss(0, spread), s) for s in seeds]
            hits += evidence.paired_difference(pairs).p_value < 1 - evidence.CONFIDENCE
        return hits / trials

    error = spread / count**0.5
    effect = error * evidence.detectable_ratio(count - 1)
    assert found(0.0) == pytest.approx(0.05, abs=0.02)  # three standard errors
    assert found(effect) == pytest.approx(evidence.POWER, abs=0.04)
