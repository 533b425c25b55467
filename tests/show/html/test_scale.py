"""Places rise with numbers and stay between the ends; what an axis names lies on it."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from portllm.show.html.scale import STEPS, Scale, round_step, widened

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
POSITIVE = st.floats(1e-9, 1e6)
MANY = settings(max_examples=60, deadline=None, derandomize=True)


@given(POSITIVE, POSITIVE, st.booleans(), st.lists(POSITIVE, min_size=2))
@MANY
def test_a_larger_number_is_never_nearer_to_the_start(one, other, is_log, values):
    assume(max(one, other) > 1.001 * min(one, other))
    scale = Scale(min(one, other), max(one, other), 5.0, 50.0, is_log=is_log)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(5.0 <= place <= 50.0 + 1e-9 for place in places)


@given(st.lists(NUMBERS, max_size=8), st.lists(NUMBERS, max_size=2))
@MANY
def test_all_numbers_lie_between_the_ends_but_for_a_hair(values, held):
    low, high = widened(values, *held)
    assert low < high
    hair = 0.03 * (high - low)
    assert all(low - hair <= value <= high + hair for value in (*values, *held))


def test_infinite_numbers_do_not_stretch_the_scale():
    assert widened([0.5, math.inf, -math.inf], 0.0, 1.0) == (0.0, 1.0)
    assert Scale(0.0, 1.0, 0.0, 10.0).at(math.inf) == 10.0


@given(POSITIVE, st.integers(1, 9))
@MANY
def test_a_step_is_round_and_not_passed_too_often(span, count):
    step = round_step(span, count)
    assert span / step <= count * (1 + 1e-6)
    assert any(math.isclose(step / 10 ** round(math.log10(step / digit)), digit, rel_tol=1e-9) for digit in STEPS)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-0.3, 0.4), (0.0, 7.1), (0.94, 1.0)])
def test_an_axis_has_some_numbers_and_all_lie_on_it(ends):
    ticks = Scale(*ends, 0.0, 100.0).ticks()
    assert 2 <= len(ticks) <= 6
    assert all(ends[0] - 1e-9 <= tick <= ends[1] + 1e-9 for tick in ticks)
