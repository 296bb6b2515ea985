import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from east_plugins.errors import UsageError
from east_plugins.plugins.density import Constant, Cyclic, Gradual, OneShot

cyclics = st.builds(
    Cyclic,
    target=st.sampled_from([0.0005, 0.001, 0.01]),
    multiplier=st.sampled_from([3.0, 10.0, 30.0]),
    cycles=st.integers(1, 3),
    length=st.integers(2, 101),
    length_mult=st.sampled_from([1.0, 2.0]),
    pattern=st.sampled_from(["triangular", "cosine"]),
    cyclic_frequency=st.integers(1, 40),
    frequency=st.integers(1, 40),
)


@given(cyclics)
def test_peak_and_close_of_every_cycle_are_exact_and_updated(schedule):
    for start, stop in zip(schedule.bounds, schedule.bounds[1:], strict=False):
        middle = (start + stop) // 2
        assert schedule.density(middle) == pytest.approx(schedule.multiplier * schedule.target, rel=1e-12)
        assert schedule.due(middle) and schedule.due(stop)
        assert schedule.density(stop) == schedule.target


@given(cyclics, st.integers(0, 2000))
def test_density_stays_between_target_and_peak(schedule, step):
    peak = schedule.target * schedule.multiplier
    assert schedule.target <= schedule.density(step) <= peak * (1 + 1e-12)
    if step >= schedule.close:
        assert schedule.density(step) == schedule.target


@given(cyclics)
def test_lengths_follow_the_length_multiplier(schedule):
    lengths = [b - a for a, b in zip(schedule.bounds, schedule.bounds[1:], strict=False)]
    assert lengths == [max(2, round(schedule.length * schedule.length_mult**i)) for i in range(schedule.cycles)]


@pytest.mark.parametrize(
    "pattern, swing",
    [("triangular", lambda p: 1 - abs(2 * p - 1)), ("cosine", lambda p: (1 - math.cos(2 * math.pi * p)) / 2)],
)
def test_equation_inside_a_cycle(pattern, swing):
    schedule = Cyclic(0.001, 10, cycles=2, length=100, pattern=pattern)
    for step in range(1, 200):
        expected = 0.001 * (1 + 9 * swing((step % 100) / 100))
        assert schedule.density(step) == pytest.approx(expected, rel=1e-12)


def test_updates_inside_and_after_the_cycles():
    schedule = Cyclic(0.001, cycles=1, length=100, cyclic_frequency=30, frequency=40, end=200)
    assert [s for s in range(0, 300) if schedule.due(s)] == [30, 50, 60, 90, 100, 120, 160]


@pytest.mark.parametrize(
    "kwargs, flag",
    [
        (dict(target=0.2, multiplier=10), "`multiplier`"),
        (dict(cycles=2, length=60, end=100), "`length`"),
        (dict(pattern="saw"), "`pattern`"),
        (dict(cycles=0), "`cycles`"),
        (dict(length=1), "`length`"),
        (dict(multiplier=math.nan), "`multiplier`"),
        (dict(cyclic_frequency=0), "`cyclic_frequency`"),
        (dict(length_mult=0), "`length_mult`"),
        (dict(target=math.nan), "`density`"),
    ],
)
def test_impossible_cycles_are_refused_by_name(kwargs, flag):
    with pytest.raises(UsageError, match=flag):
        Cyclic(**{"target": 0.001, "length": 10, **kwargs})


@pytest.mark.parametrize("density", [0, 1.5, -1, math.nan, math.inf])
def test_density_out_of_range_is_refused(density):
    with pytest.raises(UsageError, match=r"`density` must be in \(0, 1\]"):
        Constant(density)


def test_constant_updates_before_its_end_only():
    assert [s for s in range(20) if Constant(0.1, 5, end=15).due(s)] == [5, 10]
    assert not any(Constant(0.1).due(s) for s in range(100))


def test_gradual_ends_exactly_on_target():
    # the cubic schedules of ITOP, GraNet and sparsimony end off target
    schedule = Gradual(0.01, initial=0.5, start=7, stop=103, frequency=10)
    assert schedule.density(7) == 0.5 and schedule.density(103) == 0.01 and schedule.due(103)
    assert schedule.density(55) == pytest.approx(0.01 + 0.49 / 8)


def test_one_shot_prunes_once():
    schedule = OneShot(0.01, stop=9)
    assert [s for s in range(100) if schedule.due(s)] == [9]
    assert schedule.density(8) == 1 and schedule.density(9) == 0.01
