"""What PiSSA and OLoRA begin with: PEFT's factors, and how exactly they are determined."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch.delta import LowRankDelta
from portllm.patch.initial_factors import known_to, leading_columns_part, principal_part, without

SHAPES = [(12, 20), (20, 12), (64, 48)]


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gap(shape, rank, gap, seed=0):
    """A matrix whose singular values after the rank begin a share `gap` below it."""
    u, s, vt = torch.linalg.svd(normal(shape, seed).double(), full_matrices=False)
    s[rank] = s[rank - 1] * (1 - gap)
    return ((u * s) @ vt).float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (4, 1.5), (12, 0.25)])
def test_the_principal_part_has_the_factors_of_pissa_but_for_signs(shape, rank, scale):
    weight = normal(shape)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    found = principal_part(weight, rank=rank, scale=scale)
    assert torch.allclose(found.a.abs(), (root[:, None] * vt[:rank]).abs(), atol=1e-4)
    assert torch.allclose(found.b.abs(), (u[:, :rank] * root).abs(), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_leading_columns_have_the_factors_of_olora_but_for_signs(shape, rank):
    weight = normal(shape)
    q, r = torch.linalg.qr(weight)
    found = leading_columns_part(weight, rank=rank, scale=3.0)
    assert torch.allclose(found.a.abs(), r[:rank].abs(), atol=1e-4)
    assert torch.allclose(found.b.abs(), q[:, :rank].abs(), atol=1e-4)


@given(st.integers(0, 1000), st.sampled_from(SHAPES), st.integers(1, 11), st.floats(-5, -0.5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_two_decompositions_differ_by_no_more_than_the_uncertainty(seed, shape, rank, exponent):
    weight = with_gap(shape, rank, 10**exponent, seed)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    theirs = ((u[:, :rank] * s[:rank]) @ vt[:rank]).double()
    found = principal_part(weight, rank=rank, scale=2.0)
    assert (2.0 * found.b.double() @ found.a.double() - theirs).norm() <= 2 * found.uncertainty
    q, r = torch.linalg.qr(weight)
    found = leading_columns_part(weight, rank=rank, scale=2.0)
    difference = found.b.double() @ found.a.double() - q[:, :rank].double() @ r[:rank].double()
    assert 2.0 * difference.norm() <= 2 * found.uncertainty


def test_where_the_spectrum_has_no_gap_nothing_is_certain():
    assert principal_part(torch.eye(4), rank=2, scale=1.0).uncertainty == math.inf
    assert principal_part(torch.eye(4), rank=4, scale=1.0).uncertainty < 1e-5
    assert leading_columns_part(torch.zeros(4, 3), rank=2, scale=1.0).uncertainty == math.inf


@given(st.integers(0, 1000), st.floats(0.1, 4.0))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_less_what_it_began_with_is_the_difference_of_both_products(seed, scale):
    b, a, b0, a0 = (normal(shape, seed + n) for n, shape in enumerate([(12, 3), (3, 20), (12, 3), (3, 20)]))
    less = without(LowRankDelta(a=a, b=b, scale=scale), a0, b0)
    assert (less.rank, less.shape) == (6, (12, 20))
    assert torch.allclose(less.scale * less.b @ less.a, scale * (b @ a - b0 @ a0), atol=1e-4)


def test_how_exactly_a_delta_is_known_is_relative_to_its_norm():
    delta = LowRankDelta(a=torch.tensor([[3.0, 4.0]]), b=torch.tensor([[2.0]]), scale=0.5)
    assert known_to(delta, 0.05) == pytest.approx(0.01)
    assert known_to(LowRankDelta(a=torch.zeros(1, 2), b=torch.zeros(1, 1), scale=1.0), 0.05) == math.inf
