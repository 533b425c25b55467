"""Sums in float32 products over blocks, against float64."""

import numpy as np
import pytest
import torch

from portllm.measures.drift_kernel import BLOCK, DOT, DriftKernel

FLOAT32_SUMS = 1e-5
"""What float32 products over blocks may differ from float64 by, relatively."""


def stored(weight):
    """The array that stands for a weight: numpy has no bfloat16, so its bits."""
    return weight.view(torch.uint16).numpy() if weight.dtype == torch.bfloat16 else weight.numpy()


def in_float64(base, evolved):
    w0, w1 = base.double(), evolved.double()
    drift = w1 - w0
    return [(x @ y).item() for x, y in ((w0, w0), (drift, drift), (w0, w1), (w1, w1))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("drift", [1e-3, 0.1, 1.0])
def test_the_sums_are_those_of_float64(dtype, drift):
    generator = torch.Generator().manual_seed(0)
    n = 3 * BLOCK + 17
    base = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    evolved = (base.float() * (1 + drift * torch.randn(n, generator=generator))).to(dtype)
    sums = DriftKernel().measure(stored(base), stored(evolved))
    exact = in_float64(base, evolved)
    assert [sums.base_sq, sums.drift_sq, sums.product, sums.evolved_sq] == pytest.approx(exact, rel=FLOAT32_SUMS)


def test_a_mean_far_from_zero_costs_no_more():
    generator = torch.Generator().manual_seed(1)
    base = 1 + 0.01 * torch.randn(2 * BLOCK, generator=generator)
    evolved = base + 1e-4 * torch.randn(2 * BLOCK, generator=generator)
    sums = DriftKernel().measure(stored(base), stored(evolved))
    assert sums.drift_sq == pytest.approx(in_float64(base, evolved)[1], rel=FLOAT32_SUMS)


@pytest.mark.parametrize("n", [0, 1, DOT - 1, DOT, BLOCK, BLOCK + 1])
def test_any_number_of_elements_is_measured(n):
    base = np.ones(n, np.float32)
    assert DriftKernel().measure(base, 2 * base).drift_sq == n


def test_a_kernel_that_was_used_before_gives_the_same_bits():
    base, evolved = np.linspace(-1, 1, 1000), np.linspace(-1, 1.1, 1000)
    used = DriftKernel()
    used.measure(np.full(BLOCK, 7.0), np.zeros(BLOCK))
    assert used.measure(base, evolved) == DriftKernel().measure(base, evolved)


def test_an_infinity_is_seen_in_the_sums():
    assert not DriftKernel().measure(np.array([1.0, np.inf]), np.ones(2)).is_finite
