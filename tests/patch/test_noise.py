"""The noise of stochastic rounding: the same at each place whatever is asked for, and evenly spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch.noise import rounding_noise

WHOLE = rounding_noise(seed=3, tensor="w", start=0, count=300)


@given(st.integers(0, 299), st.integers(0, 299))
@settings(max_examples=75, deadline=None, derandomize=True)
def test_a_part_of_the_stream_is_a_part_of_the_whole(one, other):
    start, stop = sorted((one, other))
    assert rounding_noise(seed=3, tensor="w", start=start, count=stop - start).equal(WHOLE[start:stop])


def test_places_far_out_have_numbers_too():
    far = 2**40 + 5
    whole = rounding_noise(seed=0, tensor="w", start=far, count=50)
    assert whole[17:40].equal(rounding_noise(seed=0, tensor="w", start=far + 17, count=23))


@pytest.mark.parametrize(("seed", "tensor"), [(4, "w"), (-3, "w"), (3, "v"), (3, "w ")])
def test_another_seed_or_tensor_has_other_numbers(seed, tensor):
    assert (rounding_noise(seed=seed, tensor=tensor, start=0, count=300) == WHOLE).float().mean() < 0.05


def test_the_stream_stands_for_ever():
    # A merge with a seed must give the same bytes in every version.
    assert WHOLE[:6].tolist() == [48583, 44428, 35723, 41667, 16528, 55361]


def test_the_numbers_are_spread_evenly_over_sixteen_bits():
    n = 1 << 16
    noise = rounding_noise(seed=0, tensor="w", start=0, count=n)
    assert noise.dtype == torch.int32
    assert noise.min() >= 0
    assert noise.max() < 1 << 16
    # Sixteen equal bins: a count has the standard deviation sqrt(n * 15) / 16; five of them for a fixed seed.
    counts = torch.bincount(noise // 4096, minlength=16)
    assert (counts - n / 16).abs().max() < 5 * (n * 15) ** 0.5 / 16
    assert torch.corrcoef(torch.stack([noise[:-1], noise[1:]]).double())[0, 1].abs() < 5 / n**0.5
