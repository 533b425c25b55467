"""The measures of a merge, by hand, and that parts add up."""

import math

import pytest

from portllm.patch.rounding import MergeSums


def test_sums_of_parts_add_up_field_by_field():
    left, right = MergeSums(1.0, 2.0, 3.0, 4.0), MergeSums(10.0, 20.0, 30.0, 40.0)
    assert left + right == MergeSums(11.0, 22.0, 33.0, 44.0)
    assert left + MergeSums() == left


def test_a_delta_of_zero_loses_nothing():
    sums = MergeSums(weight_sq=4.0)
    assert (sums.kept_gain, sums.rounding_loss, sums.relative_size) == (1.0, 0.0, 0.0)
    assert MergeSums().relative_size == 0.0


def test_a_delta_on_a_weight_of_zero_has_no_relative_size():
    assert MergeSums(delta_sq=1.0, gain=1.0).relative_size == math.inf


@pytest.mark.parametrize("field", ["delta_sq", "lost_sq", "weight_sq"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_infinite_or_no_number_is_seen(field, value):
    assert MergeSums().is_finite
    assert not MergeSums(**{field: value}).is_finite
