import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.measures.residual import measure_residual
from portllm.patch.delta import LowRankDelta

D_OUT, D_IN = 20, 12


def delta(seed, *, rank=3, scale=0.75, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        a=torch.randn(rank, D_IN, generator=generator).to(dtype) * size,
        b=torch.randn(D_OUT, rank, generator=generator).to(dtype),
        scale=scale,
    )


def dense(value):
    return value.scale * value.b.double() @ value.a.double()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_singular_values_and_product_are_those_of_dense_arithmetic(seed, ranks):
    old, new = delta(seed, rank=ranks[0]), delta(seed + 1, rank=ranks[1], scale=-1.5)
    found = measure_residual(old, new)
    for values, matrix in (
        (found.ported, dense(old)),
        (found.retrained, dense(new)),
        (found.residual, dense(new) - dense(old)),
    ):
        torch.testing.assert_close(torch.tensor(values).double(), torch.linalg.svdvals(matrix)[: len(values)])
    assert len(found.residual) == sum(ranks)
    assert found.product == pytest.approx(float((dense(old) * dense(new)).sum()))


def test_the_angles_are_scipys():
    old, new = delta(1), delta(2, rank=4)
    found = measure_residual(old, new)
    for cosines, spaces in (
        (found.column_cosines, (old.b, new.b)),
        (found.row_cosines, (old.a.T, new.a.T)),
    ):
        angles = scipy.linalg.subspace_angles(*(space.double().numpy() for space in spaces))
        np.testing.assert_allclose(sorted(cosines), np.cos(angles), rtol=1e-6)


def test_the_residual_of_a_delta_with_itself_is_zero():
    found = measure_residual(delta(1), delta(1))
    assert found.residual == ()
    assert found.cosine == pytest.approx(1.0)
    assert found.column_cosines == pytest.approx((1.0,) * 3)
    assert found.row_cosines == pytest.approx((1.0,) * 3)


def test_the_residual_of_factors_in_another_basis_is_zero():
    old = delta(1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5))).Q
    turned = replace(old, b=(old.b.double() @ turn.double()).float(), a=(turn.T.double() @ old.a.double()).float())
    assert measure_residual(old, turned).residual == ()


def test_a_delta_that_was_never_trained_has_no_angle():
    old = delta(1)
    found = measure_residual(old, replace(old, b=torch.zeros_like(old.b)))
    assert (found.retrained, found.cosine, found.column_cosines) == ((), None, ())
    assert math.hypot(*found.residual) == pytest.approx(math.hypot(*found.ported))


def test_deltas_of_two_weights_are_refused():
    with pytest.raises(ValueError, match="same weight"):
        measure_residual(delta(1), replace(delta(2), transposed=True))


def test_a_magnitude_is_refused():
    with pytest.raises(ValueError, match="magnitude"):
        measure_residual(delta(1), replace(delta(2), magnitude=torch.ones(D_OUT)))
