"""common/student.py equals scipy."""

import pytest
from scipy import stats

from common import student


@pytest.mark.parametrize('freedom', [1, 2, 3.7, 8, 40, 1000])
def test_students_distribution(freedom):
    for t in (0.0, 0.01, 0.7, 2.1, 12.0, 300.0):
        assert student.student_tail(t, freedom) == pytest.approx(
            stats.t.sf(t, freedom), rel=1e-10, abs=1e-290
        )
    for probability in (0.5, 0.6, 0.9, 0.975, 0.9999):
        assert student.student_quantile(probability, freedom) == pytest.approx(
            stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-9
        )
