import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from east_plugins import CosineDecay, LinearDecay
from east_plugins.errors import UsageError
from east_plugins.plugins.registry import rate


@given(st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 1), st.integers(1, 1000))
def test_starts_at_the_first_rate_and_never_rises(name, first, steps):
    decay = rate.get(name)(first, steps, final=0.005)
    values = [decay(step) for step in range(0, 2 * steps + 3, max(1, steps // 20))]
    assert values[0] == pytest.approx(first)
    assert values == sorted(values, reverse=True)


def test_a_rate_below_the_last_one_stays():
    # half a cosine from 0 to 0.005 made gradual pruning regrow weights
    assert {rate.get(name)(0.0, 100)(step) for name in rate.names() for step in (0, 50, 100, 200)} == {0.0}
    decay = CosineDecay(0.001, 100)
    decay.steps = 100
    assert decay.get_dr() == pytest.approx(0.001)


def test_cosine_equation_and_no_rise_past_its_end():
    # ITOP's CosineAnnealingLR rises again past T_max
    decay = rate.get("cosine")(0.5, 100, final=0.005)
    assert decay(25) == pytest.approx(0.005 + 0.495 * (1 + math.cos(math.pi / 4)) / 2)
    assert decay(100) == decay(150) == decay(200) == pytest.approx(0.005)


def test_itop_surface_counts_its_own_steps():
    ours, reference = CosineDecay(0.5, 100), rate.get("cosine")(0.5, 100)
    for step in range(1, 130):
        ours.step()
        assert ours.get_dr() == reference(step)


def test_linear_decay_takes_the_arity_of_either_codebase():
    # ITOP calls LinearDecay.get_dr() without the argument that it needs there
    decay = LinearDecay(0.5, factor=0.9, frequency=10)
    for _ in range(25):
        decay.step()
    assert decay.get_dr() == decay.get_dr(0.5) == pytest.approx(0.5 * 0.9**2)


def test_linear_decay_says_what_it_was_given():
    with pytest.raises(UsageError, match="a frequency of at least 1, got 0.5, 0.9 and 0"):
        LinearDecay(0.5, 0.9, 0)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_rates_out_of_range_are_refused(value):
    with pytest.raises(UsageError, match="`death_rate`"):
        rate.get("cosine")(value, 10)
