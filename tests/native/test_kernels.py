"""The loops in C, in every variant that this processor can run, against torch's products and roundings and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.native import kernels
from portllm.patch.merge import add, delta_rows, measure_merge, round_nearest
from portllm.tensors.rounding import round_to

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
@settings(max_examples=40, deadline=None, derandomize=True)
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


def as_rows(values):
    """The elements of a row lie side by side."""
    return values


def as_columns(values):
    """The same values, of which those of a column lie side by side."""
    return np.ascontiguousarray(values.swapaxes(1, 2)).swapaxes(1, 2)


def as_part(values):
    """The same, in the middle of larger matrices that hold no numbers elsewhere."""
    stack = np.full((len(values), values.shape[2] + 3, values.shape[1] + 5), np.nan, np.float32)
    stack[:, 1:-2, 2:-3] = values.swapaxes(1, 2)
    return stack[:, 1:-2, 2:-3].swapaxes(1, 2)


@given(
    st.integers(0, 3),
    st.integers(1, 40),
    st.one_of(st.integers(1, 40), st.integers(505, 520)),
    st.one_of(st.integers(0, 40), st.integers(250, 600), st.integers(4090, 4110)),
    st.sampled_from([(as_rows, as_rows), (as_rows, as_columns), (as_columns, as_columns), (as_part, as_part)]),
)
@settings(max_examples=70, deadline=None, derandomize=True)
def test_products_are_those_of_float64_however_the_matrices_lie(count, rows, columns, width, layouts):
    rng = np.random.default_rng(rows + columns + width)
    one, other = (rng.standard_normal((count, height, width), np.float32) for height in (rows, columns))
    out = np.full((count, rows, columns), np.nan)
    kernels.products(layouts[0](one), layouts[1](other), out)
    lengths = [np.linalg.norm(values.astype(np.float64), axis=2) for values in (one, other)]
    tolerance = 1e-6 * lengths[0][:, :, None] * lengths[1][:, None]
    assert (abs(out - one.astype(np.float64) @ other.astype(np.float64).swapaxes(1, 2)) <= tolerance).all()


@pytest.mark.parametrize("layout", [as_rows, as_columns])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 33])
def test_the_products_of_rows_with_each_other_are_symmetric(layout, rank):
    rows = layout(np.random.default_rng(rank).standard_normal((2, rank, 700), np.float32))
    found = np.empty((2, rank, rank))
    kernels.products(rows, rows, found)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(found, wide @ wide.swapaxes(1, 2), atol=1e-3)
    assert (found == found.swapaxes(1, 2)).all()


@pytest.mark.parametrize("layout", [as_rows, as_columns])
def test_a_product_with_what_is_no_number_is_none(layout):
    rows = np.ones((1, 3, 40), np.float32)
    rows[0, 1, 7] = np.nan
    found = np.empty((1, 3, 3))
    kernels.products(layout(rows), layout(rows), found)
    assert np.isnan(found[0]).tolist() == [[False, True, False], [True, True, True], [False, True, False]]


@pytest.mark.parametrize(
    ("one", "other", "out"),
    [
        (np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 7), np.float32), np.zeros((2, 3, 3))),
        (np.zeros((2, 3, 8), np.float32), np.zeros((1, 3, 8), np.float32), np.zeros((2, 3, 3))),
        (np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 4))),
        (np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 16), np.float32)[:, :, ::2], np.zeros((2, 3, 3))),
        (np.zeros((2, 3, 8)), np.zeros((2, 3, 8)), np.zeros((2, 3, 3))),
        (np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32), np.zeros((3, 3))),
    ],
)
def test_matrices_that_cannot_be_multiplied_are_refused(one, other, out):
    with pytest.raises(ValueError, match=r"do not fit|are needed"):
        kernels.products(one, other, out)


def rounding(weights, deltas):
    sums = np.empty((len(weights), 8))
    kernels.rounding(weights, deltas, sums, len(weights))
    return sums


EDGES = [0.0, 2.0**-25, 1.5 * 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-25, 65504.0, 65519.99, 1.0009765, 1e-30, -0.3, 3e-6]


@pytest.mark.parametrize("place", [("BF16", 2), ("F16", 4), ("F32", 6)])
def test_what_is_stored_is_what_numpy_stores(place):
    dtype, column = place
    values = np.array(EDGES + [-value for value in EDGES], np.float32)
    ones = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    values = np.concatenate([values, ones, ones * np.float32(2.0**-14), ones * np.float32(3e-7)])
    found = rounding(np.zeros((len(values), 1), np.float32), values[:, None])  # of one weight: <Q(Δ), Δ>
    assert (found[:, column].astype(np.float32) == round_to(values, dtype) * values).all()


@pytest.mark.parametrize("n", [0, 1, 17, 4096, 9001])
def test_the_sums_of_rounding_are_those_of_float64(n):
    rng = np.random.default_rng(n)
    weights = rng.standard_normal((3, n), np.float32) * np.float32(0.02)
    deltas = rng.standard_normal((3, n), np.float32) * np.float32(1e-4)
    w, d = weights.astype(np.float64), deltas.astype(np.float64)
    exact = [(d * d).sum(axis=1), (w * w).sum(axis=1)]
    for dtype in ("BF16", "F16", "F32"):
        moved = (round_to(weights + deltas, dtype) - weights).astype(np.float64)
        exact += [(moved * d).sum(axis=1), ((moved - d) ** 2).sum(axis=1)]
    np.testing.assert_allclose(rounding(weights, deltas), np.stack(exact, axis=1), rtol=1e-4, atol=1e-12)


def test_what_float16_cannot_hold_shows_in_its_sums_alone():
    for weight, delta in ((65000.0, 520.0), (-65000.0, -1e6), (0.0, 1e30)):
        sums = rounding(np.full((1, 1), weight, np.float32), np.full((1, 1), delta, np.float32))[0]
        assert np.isfinite(sums[[2, 3, 6, 7]]).all() or delta == 1e30
        assert not np.isfinite(sums[5])


@pytest.mark.parametrize("sizes", [(8, 7, 8), (8, 8, 7), (7, 7, 8)])
def test_weights_and_deltas_of_other_sizes_are_refused(sizes):
    weights, deltas, sums = sizes
    with pytest.raises(ValueError, match="do not fit"):
        kernels.rounding(bytes(weights), bytes(deltas), bytearray(8 * sums), 1)


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
