"""Low-rank deltas from two weights: laws, and the truncated decomposition in float64 as oracle."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.patch.capture import BLOCK_ELEMENTS, RoundingNoise, capture_low_rank, residual_sq, truncate
from portllm.patch.delta import LowRankDelta
from portllm.patch.merge import delta_rows

SIZES = [0.0045, 0.013, 0.04]
"""Norms of a delta relative to its weight: those at which what is lost to rounding was measured."""


def bf16_pair(m, n, *, rank, size, seed=0, round_base=True):
    """A weight and its fine-tuned form, both stored in bfloat16, and the delta between them before that."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(m, n, generator=generator)
    delta = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    delta *= size * weight.norm() / delta.norm()
    base = weight.bfloat16()
    before = weight if round_base else base.float()
    return base, (before + delta).bfloat16(), delta


def dense(delta):
    return delta_rows(delta.b, delta.a, scale=delta.scale)


def test_nothing_is_captured_from_a_base_and_itself():
    weight = torch.randn(6, 4)
    captured = capture_low_rank(weight, weight.clone(), rank=2)
    assert captured.delta is None
    assert (captured.rank, captured.truncation_residual) == (0, 0.0)


@given(m=st.integers(1, 14), n=st.integers(1, 14), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_residual_falls_with_the_rank_to_nothing(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    base, tuned = torch.randn(m, n, generator=generator), torch.randn(m, n, generator=generator)
    residuals = [capture_low_rank(base, tuned, rank=rank).truncation_residual for rank in range(1, min(m, n) + 1)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(residuals))
    assert residuals[-1] < 1e-5


def test_the_residual_is_that_of_the_best_delta_of_the_rank():
    generator = torch.Generator().manual_seed(0)
    base, tuned = torch.randn(90, 70, generator=generator), torch.randn(90, 70, generator=generator)
    s = torch.linalg.svdvals(tuned.double() - base.double())
    captured = capture_low_rank(base, tuned, rank=20)
    assert captured.truncation_residual == pytest.approx((s[20:].norm() / s.norm()).item(), rel=1e-4)
    assert captured.difference_sq == pytest.approx(s.square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured_whole_and_merged_is_tuned_within_one_step(dtype):
    base, tuned, _ = bf16_pair(40, 30, rank=5, size=0.05)
    base, tuned = base.to(dtype), tuned.to(dtype)
    captured = capture_low_rank(base, tuned, rank=30)
    merged = (base.float() + dense(captured.delta)).to(dtype)
    step = torch.finfo(dtype).eps * tuned.float().abs()
    assert ((merged.float() - tuned.float()).abs() <= step).all()
    assert (merged == tuned).float().mean() > 0.99


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("round_base", [True, False])
def test_the_rank_above_the_noise_is_the_true_one(size, round_base):
    base, tuned, delta = bf16_pair(768, 512, rank=16, size=size, round_base=round_base)
    captured = capture_low_rank(base, tuned)
    assert captured.rank == 16
    # Cut to its rank, the difference is far closer to the delta than it was with its noise.
    noise = (tuned.float() - base.float() - delta).norm()
    assert (dense(captured.delta) - delta).norm() < 0.35 * noise


def test_no_singular_value_below_the_edge_is_kept():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 200, generator=generator)).Q for side in (300, 200))
    base = (0.02 * torch.randn(300, 200, generator=generator)).bfloat16()
    tuned = (base.float() + (left * 0.3 * 0.96 ** torch.arange(200)) @ right.T).bfloat16()
    captured = capture_low_rank(base, tuned)
    s = torch.linalg.svdvals(tuned.double() - base.double())
    assert captured.rank == (s > captured.noise_edge).sum()
    assert 0 < captured.rank < 150


def test_a_change_that_is_all_rounding_is_not_captured():
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(300, 200, generator=generator)
    captured = capture_low_rank(weight.bfloat16(), (weight * 1.00001).bfloat16())
    assert captured.delta is None
    assert captured.truncation_residual == 1.0


def test_the_rank_above_the_noise_is_bounded_on_demand():
    base, tuned, _ = bf16_pair(300, 200, rank=16, size=0.05)
    assert capture_low_rank(base, tuned, max_rank=5).rank == 5


def test_directions_that_are_rounding_of_the_computation_are_dropped():
    base = torch.zeros(30, 20)
    assert capture_low_rank(base, base + torch.outer(torch.rand(30), torch.rand(20)), rank=8).rank == 1


def test_the_factors_share_the_scale():
    delta = truncate(torch.diag(torch.tensor([4.0, 0.0]))[:, :1], rank=1).delta
    assert (delta.a.tolist(), delta.b.tolist(), delta.scale) == ([[2.0]], [[2.0], [0.0]], 1.0)


def test_the_same_weights_give_the_same_bytes():
    base, tuned, _ = bf16_pair(300, 200, rank=16, size=0.05)
    first, second = capture_low_rank(base, tuned).delta, capture_low_rank(base, tuned).delta
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


def test_noise_gathered_by_blocks_is_that_of_the_whole():
    base, tuned, _ = bf16_pair(50, 30, rank=4, size=0.05)
    whole, parts = RoundingNoise((50, 30)), RoundingNoise((50, 30))
    whole.add_rows(0, base, tuned)
    for start in range(0, 50, 7):
        parts.add_rows(start, base[start : start + 7], tuned[start : start + 7])
    assert torch.allclose(whole.rows, parts.rows)
    assert parts.edge == pytest.approx(whole.edge, rel=1e-6)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 0.0])
def test_the_residual_is_measured_though_little_is_left_out(noise):
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(150, 5, generator=generator) @ torch.randn(5, 130, generator=generator)
    difference = low + noise * torch.randn(150, 130, generator=generator)
    captured = truncate(difference, rank=5)
    exact = (difference.double() - captured.delta.b.double() @ captured.delta.a.double()).square().sum().item()
    assert captured.residual_sq == pytest.approx(exact, rel=2e-3, abs=1e-12 * captured.difference_sq)


def test_the_residual_is_measured_in_blocks_of_rows():
    wide = BLOCK_ELEMENTS // 2
    difference = torch.ones(3, wide)
    delta = LowRankDelta(a=torch.ones(1, wide), b=torch.tensor([[0.5], [0.5], [1.0]]), scale=1.0)
    assert residual_sq(difference, delta) == pytest.approx(0.5 * wide)
