"""The regression of factors: NumPy's least squares is the oracle, and its laws."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from portllm.methods.refit import Sums

CLOSE = 1e-8
"""Of float64, where normal equations square the condition of a regression of random numbers."""


def some(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(z, error, weight, *, parts=1):
    first, *others = (Sums.of(z[rows], error[rows], weight[rows]) for rows in torch.arange(len(z)).chunk(parts))
    return sum(others, first)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rho=st.sampled_from([0.0, 0.01, 1.0]), parts=st.integers(1, 4))
def test_the_change_is_that_of_weighted_ridge_regression(seed, rho, parts):
    z, error, weight = some(40, 3, seed=seed), some(40, 5, seed=seed + 1), some(40, seed=seed + 2).abs()
    root = weight.sqrt()[:, None]
    penalty = np.sqrt(rho * float((root * z).pow(2).sum()) / 3)
    left = np.vstack([(root * z).numpy(), penalty * np.eye(3)])
    right = np.vstack([(root * error).numpy(), np.zeros((3, 5))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert np.abs(summed(z, error, weight, parts=parts).solve(rho).numpy() - expected).max() < CLOSE


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_change_does_not_depend_on_the_size_of_the_weights_and_follows_that_of_errors(seed, factor):
    z, error, weight = some(20, 3, seed=seed), some(20, 4, seed=seed + 1), some(20, seed=seed + 2).abs()
    plain = summed(z, error, weight).solve(0.1)
    assert (summed(z, error, factor * weight).solve(0.1) - plain).abs().max() < CLOSE * plain.abs().max()
    assert (summed(z, factor * error, weight).solve(0.1) - factor * plain).abs().max() < CLOSE * factor


def test_a_direction_that_no_token_has_is_left_alone():
    z = some(20, 3, seed=0)
    z[:, 2] = z[:, 0] + z[:, 1]
    change = summed(z, some(20, 4, seed=1), torch.ones(20)).solve(0.0)
    assert change.isfinite().all()
    assert (change @ torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)).abs().max() < CLOSE


def test_tokens_of_no_weight_and_errors_of_zero_change_nothing():
    z, error = some(20, 3, seed=0), some(20, 4, seed=1)
    assert not summed(z, error, torch.zeros(20)).solve(0.1).any()
    assert not summed(z, torch.zeros_like(error), torch.ones(20)).solve(0.1).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_what_is_left_beyond_factors_in_force_is_what_errors_lack_with_them(seed):
    z, error, weight = some(20, 3, seed=seed), some(20, 4, seed=seed + 1), some(20, seed=seed + 2).abs()
    b = some(4, 3, seed=seed + 3)
    lacking = summed(z, error - z @ b.T, weight).solve(0.1)
    assert (summed(z, error, weight).beyond(b).solve(0.1) - lacking).abs().max() < CLOSE


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_inputs_in_float32_give_what_they_give_in_float64_up_to_their_rounding(seed):
    inputs = [each.float() for each in (some(400, 8, seed=seed), some(400, 16, seed=seed + 1))]
    weight = some(400, seed=seed + 2).abs().float()
    single = summed(*inputs, weight, parts=4).solve(1.0)
    exact = summed(*(each.double() for each in inputs), weight.double(), parts=4).solve(1.0)
    assert single.dtype == torch.float64
    assert (single - exact).abs().max() < 1e-5 * exact.abs().max()
