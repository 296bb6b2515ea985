import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from east_plugins.errors import UsageError
from east_plugins.ops.counts import apportion


@st.composite
def problems(draw):
    upper = draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=12))
    lower = [draw(st.integers(0, u)) for u in upper]
    weights = [draw(st.floats(0, 1e6)) for _ in upper]
    total = draw(st.integers(sum(lower), sum(upper)))
    return weights, total, lower, upper


@given(problems())
@example(([2e-309, 0.0], 1, [0, 0], [2, 1]))
@example(([2e-309, 1.0], 3, [0, 0], [2, 1]))
def test_sum_is_exact_and_bounds_hold(problem):
    weights, total, lower, upper = problem
    counts = apportion(weights, total, lower, upper)
    assert sum(counts) == total
    assert all(low <= n <= up for low, n, up in zip(lower, counts, upper, strict=True))


def test_proportional_where_no_bound_is_met():
    assert apportion([1, 2, 3, 4], 100, 0, [1000] * 4) == [10, 20, 30, 40]


def test_share_over_the_bound_goes_to_the_others():
    # DCTpS clips ERK without redistributing: 0.190 instead of 0.2
    assert apportion([10, 1, 1], 60, 1, [20, 100, 100]) == [20, 20, 20]


def test_equal_remainders_go_to_the_earlier_layer():
    assert apportion([1, 1, 1], 4, 0, [9, 9, 9]) == [2, 1, 1]


@given(st.integers(1, 40))
def test_proportions_differ_from_the_real_share_by_less_than_one(n):
    weights = np.arange(1, n + 1)
    counts = apportion(weights, 1000, 0, [10_000] * n)
    np.testing.assert_array_less(np.abs(counts - 1000 * weights / weights.sum()), 1)


@pytest.mark.parametrize("total", [2, 31])
def test_impossible_totals_are_refused(total):
    with pytest.raises(UsageError, match="3 to 30"):
        apportion([1, 1, 1], total, 1, [10, 10, 10])
