"""The arithmetic of a merge: against float64, by hand, and against torch's own rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch.merge import add, delta_rows, fold_scale, measure_merge, round_nearest, round_stochastic
from portllm.patch.noise import rounding_noise

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNIT_ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
MEASURE_TOLERANCE = 1e-5  # the sums of a block are taken in float32, see measure_merge


def draw(*shape, seed, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def test_by_hand_a_delta_is_scaled_after_the_product():
    b, a = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0, 3.0], [0.5, 1.0, 0.0]])
    assert delta_rows(b, a, scale=2.0).tolist() == [[4.0, 4.0, 6.0], [-1.0, -2.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_multiplied_in_float32_whatever_they_are_stored_in(dtype):
    b, a = draw(20, 4, seed=1).to(DTYPES[dtype]), draw(4, 12, seed=2).to(DTYPES[dtype])
    delta = delta_rows(b, a, scale=0.7)
    exact = b.double() @ a.double() * 0.7
    assert delta.dtype == torch.float32
    assert (delta - exact).abs().max() <= 8 * UNIT_ROUNDOFF["F32"] * (b.double().abs() @ a.double().abs()).max()


def test_a_factor_in_float64_is_not_rounded_first():
    b, a = torch.tensor([[1.0 + 2.0**-40]], dtype=torch.float64), torch.tensor([[1.0]])
    assert delta_rows(b, a, scale=1.0).item() == 1.0 + 2.0**-40
    weight = torch.zeros(1, 1)
    assert round_nearest(add(weight, delta_rows(b, a, scale=1.0)), dtype=torch.float64).item() == 1.0 + 2.0**-40


TINY, HUGE = 2.0**-60, 2.0**60


@given(
    st.sampled_from([0.25, 0.5, 1.0, 2.0, 64.0, 2.0**40, 2.0**-40]),
    st.sampled_from([TINY, 1e-3, 1.0, HUGE]),
    st.sampled_from([TINY, 1e-3, 1.0, HUGE]),
    st.integers(0, 100),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_scale_that_is_folded_into_a_factor_changes_no_bit(scale, b_size, a_size, seed):
    b, a = draw(20, 4, seed=seed, size=b_size), draw(4, 12, seed=seed + 1, size=a_size)
    folded, rest = fold_scale(b, a, scale)
    left, right = delta_rows(folded, a, scale=rest), delta_rows(b, a, scale=scale)
    assert left.view(torch.int32).equal(right.view(torch.int32))


def test_a_scale_is_folded_only_where_that_is_exact():
    b, a = draw(20, 4, seed=1, size=0.01), draw(4, 12, seed=2)
    folded, rest = fold_scale(b, a, 2.0)
    assert (rest, folded.equal(b * 2)) == (1.0, True)
    assert fold_scale(torch.zeros(20, 4), a, 2.0)[1] == 1.0
    kept = [(b, a, 0.7), (b, a, -2.0), (b, a, 0.0), (b.double(), a, 2.0), (b * TINY, a * TINY, 2.0)]
    kept += [(b * HUGE, a * HUGE, 2.0**20), (b * math.nan, a, 2.0), (b * math.inf, a, 2.0), (b, a, math.inf)]
    for left, right, scale in kept:
        same, rest = fold_scale(left, right, scale)
        assert (same is left, rest) == (True, scale)


def test_by_hand_ties_go_to_even_and_the_sum_is_rounded_once():
    one = torch.ones(1, 4, dtype=torch.bfloat16)
    step = 2.0**-7  # the distance of bfloat16 numbers above one
    delta = torch.tensor([[step / 2, 3 * step / 2, step / 2 + 2.0**-20, -step / 4]])
    merged = round_nearest(add(one, delta), dtype=torch.bfloat16)
    assert merged.tolist() == [[1.0, 1.0 + 2 * step, 1.0 + step, 1.0]]
    # Rounding the delta first would lose 2^-9 and its part of the sum.
    twice = torch.tensor([[2.0**-9 + 2.0**-8 + 2.0**-17]])
    assert round_nearest(add(one[:, :1], twice), dtype=torch.bfloat16).item() == 1.0 + step


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(shapes, st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES)), st.integers(0, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_merged_weight_is_within_one_rounding_of_the_exact_sum(shape, stored, to, seed):
    weight, delta = draw(*shape, seed=seed).to(DTYPES[stored]), draw(*shape, seed=seed + 1, size=0.01)
    merged = round_nearest(add(weight, delta), dtype=DTYPES[to])
    exact = weight.double() + delta.double()
    assert merged.dtype == DTYPES[to]
    bound = exact.abs() * (UNIT_ROUNDOFF[to] + UNIT_ROUNDOFF["F32"] * 2) + 2.0**-25  # f16 has small numbers without
    assert ((merged.double() - exact).abs() <= bound).all()
    assert merged.equal((weight.float() + delta).to(DTYPES[to]))


def test_inputs_of_a_merge_stay_as_they_are():
    weight, delta = draw(3, 5, seed=1), draw(3, 5, seed=2)
    b, a = draw(3, 2, seed=3), draw(2, 5, seed=4)
    before = [tensor.clone() for tensor in (weight, delta, a, b)]
    delta_rows(b, a, scale=3.0)
    measure_merge(weight, delta, round_nearest(add(weight, delta), dtype=torch.float32))
    round_stochastic(add(weight, delta), noise=torch.ones(3, 5, dtype=torch.int32))
    assert all(now.equal(then) for now, then in zip((weight, delta, a, b), before, strict=True))


def test_by_hand_the_measures_of_a_merge():
    weight, delta = torch.tensor([[1.0, 2.0], [0.0, 2.0]]), torch.tensor([[0.5, 0.0], [1.0, -1.0]])
    merged = torch.tensor([[1.0, 2.0], [1.0, 1.5]])
    sums = measure_merge(weight, delta, merged)
    measured = (sums.delta_sq, sums.gain, sums.lost_sq, sums.weight_sq)
    assert measured == pytest.approx((2.25, 1.5, 0.5, 9.0), rel=1e-6)
    assert sums.kept_gain == pytest.approx(2 / 3)
    assert sums.rounding_loss == pytest.approx(math.sqrt(0.5 / 2.25))
    assert sums.relative_size == pytest.approx(0.5)


@given(shapes, st.sampled_from(sorted(DTYPES)), st.floats(1e-4, 1.0), st.integers(0, 100))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_measures_are_those_of_float64(shape, dtype, size, seed):
    weight, delta = draw(*shape, seed=seed).to(DTYPES[dtype]), draw(*shape, seed=seed + 1, size=size)
    merged = round_nearest(add(weight, delta), dtype=DTYPES[dtype])
    sums = measure_merge(weight, delta, merged)

    change, exact = merged.double() - weight.double(), delta.double()
    assert sums.kept_gain == pytest.approx(
        (change * exact).sum().item() / exact.square().sum().item(), rel=MEASURE_TOLERANCE, abs=MEASURE_TOLERANCE
    )
    loss = (change - exact).norm().item() / exact.norm().item()
    assert sums.rounding_loss == pytest.approx(loss, rel=1e-3, abs=MEASURE_TOLERANCE)
    assert sums.relative_size == pytest.approx(
        exact.norm().item() / weight.double().norm().item(), rel=MEASURE_TOLERANCE
    )


@given(st.integers(2, 9), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_sums_of_blocks_of_rows_are_the_sums_of_the_whole(rows, d_in, data):
    cut = data.draw(st.integers(1, rows - 1))
    weight, delta = draw(rows, d_in, seed=rows).bfloat16(), draw(rows, d_in, seed=d_in, size=0.01)
    merged = round_nearest(add(weight, delta), dtype=torch.bfloat16)
    whole = measure_merge(weight, delta, merged)
    parts = [measure_merge(weight[part], delta[part], merged[part]) for part in (slice(cut), slice(cut, None))]
    total = parts[0] + parts[1]
    for field in ("delta_sq", "gain", "lost_sq", "weight_sq"):
        assert getattr(total, field) == pytest.approx(getattr(whole, field), rel=MEASURE_TOLERANCE, abs=1e-30)


def test_a_small_delta_on_large_weights_is_lost_in_bfloat16_and_kept_in_float32():
    weight, delta = torch.full((4, 8), 1.0), torch.full((4, 8), 2.0**-12)
    lost = measure_merge(weight.bfloat16(), delta, round_nearest(add(weight.bfloat16(), delta), dtype=torch.bfloat16))
    kept = measure_merge(weight, delta, round_nearest(add(weight, delta), dtype=torch.float32))
    assert (lost.kept_gain, lost.rounding_loss) == (0.0, pytest.approx(1.0))
    assert (kept.kept_gain, kept.rounding_loss) == (pytest.approx(1.0), 0.0)


@pytest.mark.parametrize("place", ["weight", "delta", "merged"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite_is_seen_in_the_sums(place, value):
    values = {"weight": draw(3, 4, seed=1), "delta": draw(3, 4, seed=2), "merged": draw(3, 4, seed=3)}
    assert measure_merge(**values).is_finite
    values[place][1, 2] = value
    assert not measure_merge(**values).is_finite


def test_stochastic_rounding_gives_one_of_the_two_neighbors():
    weight, delta = draw(40, 50, seed=1).bfloat16(), draw(40, 50, seed=2, size=0.003)
    noise = rounding_noise(seed=0, tensor="w", start=0, count=2000).reshape(40, 50)
    merged = round_stochastic(add(weight, delta), noise=noise)
    bits = (weight.float() + delta).view(torch.int32)
    below, above = (part.view(torch.float32) for part in ((bits >> 16) << 16, ((bits >> 16) + 1) << 16))
    exact_already = (bits & 0xFFFF) == 0
    assert ((merged.float() == below) | ((merged.float() == above) & ~exact_already)).all()
    assert merged.dtype == torch.bfloat16
    assert (merged.float() == below).any()
    assert (merged.float() == above).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", [0.03, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_right_on_average(sign, share):
    n = 100_000
    step = 2.0**-7
    weight, delta = torch.full((1, n), sign).bfloat16(), torch.full((1, n), sign * step * share)
    noise = rounding_noise(seed=5, tensor="w", start=0, count=n).reshape(1, n)
    change = (round_stochastic(add(weight, delta), noise=noise).double() - sign) * sign / step
    # The mean of n draws with probability p has the standard error sqrt(p (1-p) / n); five of them for a fixed seed.
    assert abs(change.mean().item() - share) < 5 * math.sqrt(share * (1 - share) / n)


def test_without_noise_stochastic_rounding_cuts():
    assert round_stochastic(
        add(torch.ones(1, 1), torch.tensor([[0.0077]])), noise=torch.zeros(1, 1, dtype=torch.int32)
    ).item() == pytest.approx(1.0)


def test_an_infinite_sum_stays_infinite_in_stochastic_rounding():
    weight = torch.tensor([[math.inf, -math.inf, torch.finfo(torch.float32).max]])
    noise = torch.full((1, 3), 65535, dtype=torch.int32)
    assert round_stochastic(add(weight, torch.zeros(1, 3)), noise=noise).tolist() == [[math.inf, -math.inf, math.inf]]
