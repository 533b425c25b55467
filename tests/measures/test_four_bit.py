"""Quantized and dequantized again, against bitsandbytes itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from portllm.measures import four_bit
from portllm.measures.four_bit import CODES, SCHEMES, block_scales, requantized, stored_scales

LAST_BITS = 1e-6
"""A sum of float32 numbers, equal steps between two of them: the last bits depend on the order of the operations."""

TIES = 0.005
"""Share of elements whose scale is so near the middle of two steps that these bits decide where it goes."""


def again(values, name):
    scales = block_scales(values)
    return requantized(values, scales, stored_scales(scales, SCHEMES[name]), SCHEMES[name])


def by_bitsandbytes(values, name):
    functional = pytest.importorskip("bitsandbytes.functional")
    scheme = SCHEMES[name]
    packed, state = functional.quantize_4bit(
        torch.from_numpy(values), blocksize=64, compress_statistics=scheme.is_double, quant_type=scheme.kind
    )
    return functional.dequantize_4bit(packed, state).numpy().reshape(-1)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("count", [64 * 700, 64 * 300 + 30, 7])
def test_what_is_left_is_what_bitsandbytes_leaves(name, count):
    values = np.random.default_rng(0).normal(scale=0.02, size=count).astype(np.float32)
    found, expected = again(values, name), by_bitsandbytes(values, name)
    if SCHEMES[name].is_double:
        close = np.isclose(found, expected, rtol=LAST_BITS, atol=0)
        assert close.mean() >= 1 - TIES
        np.testing.assert_allclose(found, expected, rtol=0.02)  # the other step is next to it
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", CODES)
def test_the_codes_are_those_of_bitsandbytes(kind):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = np.unique(functional.get_4bit_type(kind, device="cpu").numpy())
    np.testing.assert_array_equal(np.array(CODES[kind], np.float32), theirs)


def test_the_code_of_the_scales_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_allclose(four_bit._dynamic_code(), functional.create_dynamic_map().numpy(), rtol=LAST_BITS)


@pytest.mark.parametrize("kind", CODES)
def test_cells_find_the_nearest_value_on_either_side_of_every_border_and_edge(kind):
    code = np.array(CODES[kind], np.float32)
    places = np.concatenate(
        [(code[:-1] + code[1:]) / 2, code, np.arange(four_bit.CELLS + 1) / (four_bit.CELLS / 2) - 1]
    )
    places = places.astype(np.float32)
    near = [places, np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)]
    for direction in (-2, 2):
        step = places
        for _ in range(3):
            step = np.nextafter(step, np.float32(direction))
            near.append(step)
    values = np.clip(np.concatenate(near), -1, 1)
    np.testing.assert_array_equal(four_bit._nearest_of_16(values, kind), four_bit._nearest(values, code))


FLOATS = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS), st.sampled_from(["nf4", "fp4"]))
def test_what_is_quantized_stays_when_it_is_quantized_again(values, name):
    once = again(values, name)
    np.testing.assert_allclose(again(once, name), once, rtol=1e-6)
    assert np.array_equal(block_scales(once), block_scales(values))


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS), st.sampled_from(list(SCHEMES)))
def test_the_largest_gap_of_the_code_bounds_the_error(values, name):
    scales = block_scales(values)
    stored = stored_scales(scales, SCHEMES[name])
    error = np.abs(requantized(values, scales, stored, SCHEMES[name]) - values)
    gap = np.diff(CODES[SCHEMES[name].kind]).max() / 2
    bound = np.repeat(scales * gap + np.abs(stored - scales), 64)[: len(values)]
    assert (error <= bound * (1 + 1e-5) + 1e-30).all()


def test_zeros_stay_zeros_and_nothing_stays_nothing():
    assert not again(np.zeros(130, np.float32), "nf4").any()
    assert again(np.empty(0, np.float32), "nf4-double").size == 0
