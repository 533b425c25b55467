"""The loops in C, in every variant that this processor can run, against torch's products and roundings and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.native import kernels
from portllm.patch.merge import add, delta_rows, measure_merge, round_nearest

if kernels is None:
    pytest.skip("the loops were not built, or the processor cannot run them", allow_module_level=True)

FLOAT32_SUMS = 1e-5
"""What sums over runs of float32 products may differ from float64 by, relatively."""

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@pytest.fixture(params=kernels.variants(), autouse=True)
def variant(request):
    kernels.choose(request.param)
    yield request.param
    kernels.choose(kernels.variants()[-1])


def draw(*shape, seed, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def stored(weight):
    return weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()


def merged(weight, b, a, scale):
    """The bytes that the loop makes, as a tensor like the weight, and its sums."""
    out = torch.empty_like(weight)
    is_float32 = weight.dtype == torch.float32
    sums = kernels.merge(stored(weight), b.numpy(), a.numpy(), scale, stored(out), a.shape[0], is_float32)
    return out, sums


def assert_as_torch(rows, width, rank, scale, dtype, seed=0):
    weight = draw(rows, width, seed=seed, size=0.02).to(DTYPES[dtype])
    b, a = draw(rows, rank, seed=seed + 1, size=0.01), draw(rank, width, seed=seed + 2, size=0.01)
    delta = delta_rows(b, a, scale=scale)
    expected = round_nearest(add(weight, delta), dtype=weight.dtype)
    out, sums = merged(weight, b, a, scale)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    w, d, q = weight.double(), delta.double(), expected.double()
    exact = [(d * d).sum(), ((q - w) * d).sum(), ((q - w - d) ** 2).sum(), (w * w).sum()]
    assert list(sums) == pytest.approx([value.item() for value in exact], rel=FLOAT32_SUMS)


@given(
    st.integers(16, 70),
    st.integers(16, 1200),
    st.integers(1, 128),
    st.sampled_from([1.0, 2.0, 0.5, 0.7, 16.0]),
    st.sampled_from(sorted(DTYPES)),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_bytes_are_those_of_torch_for_every_shape_and_rank(rows, width, rank, scale, dtype):
    assert_as_torch(rows, width, rank, scale, dtype, seed=rows + width)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 513), (4, 512), (5, 15), (64, 2048)])
def test_rows_and_columns_that_fill_no_tile_are_made_like_those_that_do(rows, width):
    whole, b, a = draw(64, 2048, seed=1).bfloat16(), draw(64, 8, seed=2), draw(8, 2048, seed=3)
    expected, _ = merged(whole, b, a, 0.7)
    part, _ = merged(whole[:rows, :width].contiguous(), b[:rows], a[:, :width].contiguous(), 0.7)
    assert torch.equal(part.view(torch.uint8), expected[:rows, :width].contiguous().view(torch.uint8))


def test_ties_go_to_even():
    weight = torch.ones(16, 16, dtype=torch.bfloat16)
    half_step, step_and_half = 2.0**-8, 3 * 2.0**-8
    for change, expected in ((half_step, 1.0), (step_and_half, 1 + 2 * 2.0**-7)):
        out, _ = merged(weight, torch.full((16, 1), change), torch.ones(1, 16), 1.0)
        assert (out.float() == expected).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["weight", "b", "a"])
def test_what_is_no_number_shows_in_the_sums(bad, place):
    given = {"weight": draw(16, 40, seed=1).bfloat16(), "b": draw(16, 4, seed=2), "a": draw(4, 40, seed=3)}
    given[place][2, 1] = bad
    _, (delta_sq, _, lost_sq, weight_sq) = merged(given["weight"], given["b"], given["a"], 1.0)
    assert not np.isfinite(delta_sq + lost_sq + weight_sq)


def test_a_sum_too_large_for_its_dtype_shows_in_the_sums():
    weight = torch.full((16, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    _, (_, _, lost_sq, _) = merged(weight, torch.full((16, 1), 1e38), torch.ones(1, 16), 1.0)
    assert not np.isfinite(lost_sq)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 4095, 4097, 3 * 4096 + 5])
def test_the_sums_of_drift_are_those_of_float64(n):
    base, moved = draw(n, seed=4, size=0.02).bfloat16(), draw(n, seed=5, size=1e-4)
    evolved = (base.float() + moved).bfloat16()
    w0, d = base.double(), evolved.double() - base.double()
    exact = [(w0 @ w0).item(), (d @ d).item(), (w0 @ d).item()]
    found = kernels.drift(stored(base), stored(evolved))
    assert list(found[:2]) == pytest.approx(exact[:2], rel=FLOAT32_SUMS)
    assert found[2] == pytest.approx(exact[2], abs=FLOAT32_SUMS * np.sqrt(exact[0] * exact[1]) + 1e-30)


def test_measures_differ_from_those_of_torch_by_rounding_only():
    weight, b, a = draw(64, 300, seed=1).bfloat16(), draw(64, 8, seed=2, size=0.01), draw(8, 300, seed=3, size=0.01)
    delta = delta_rows(b, a, scale=2.0)
    torchs = measure_merge(weight, delta, round_nearest(add(weight, delta), dtype=torch.bfloat16))
    _, sums = merged(weight, b, a, 2.0)
    assert list(sums) == pytest.approx([torchs.delta_sq, torchs.gain, torchs.lost_sq, torchs.weight_sq], rel=1e-5)


@pytest.mark.parametrize("lacks", ["weight", "b", "a", "out"])
def test_sizes_that_do_not_fit_are_refused_before_anything_is_read(lacks):
    sizes = {"weight": 16 * 40, "b": 16 * 4, "a": 4 * 40, "out": 16 * 40}
    sizes[lacks] -= 1
    weight, out = (np.zeros(sizes[name], np.uint16) for name in ("weight", "out"))
    b, a = (np.zeros(sizes[name], np.float32) for name in ("b", "a"))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.merge(weight, b, a, 1.0, out, 4, False)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        kernels.merge(b"", b"", b"", 1.0, bytearray(), 0, False)


def test_models_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="same number"):
        kernels.drift(bytes(4), bytes(2))


def test_a_variant_that_nobody_wrote_is_refused():
    with pytest.raises(ValueError, match="sse1"):
        kernels.choose("sse1")
