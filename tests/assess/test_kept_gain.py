"""Rounding in numpy, against torch's, and its measures against those of a merge."""

import numpy as np
import pytest
import torch

from portllm.assess.kept_gain import STORED_AS, measure_rounding, round_to
from portllm.checkpoint.tensors import TORCH_DTYPES
from portllm.patch.merge import measure_merge

HARD = [0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, 65520.0, 65519.0, 6e-8, 1e-40, np.inf, -np.inf, np.nan]
SAME_SUMS = 1e-5
"""Sums in float64 here, row by row in float32 in a merge."""


@pytest.mark.parametrize("dtype", STORED_AS)
def test_rounding_is_that_of_torch(dtype):
    values = np.concatenate([HARD, np.random.default_rng(0).normal(size=5000) * 10.0 ** np.arange(-10, 10).repeat(250)])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(TORCH_DTYPES[dtype]).float().numpy()
    np.testing.assert_array_equal(round_to(values, dtype), expected)


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_measures_are_those_of_a_merge(dtype, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator).to(torch.bfloat16)
    delta = size * torch.randn(8, 40, generator=generator)
    merged = (weight.float() + delta).to(TORCH_DTYPES[dtype])
    theirs = measure_merge(weight, delta, merged)
    ours = measure_rounding(weight.float().numpy(), delta.numpy(), dtype)
    assert (ours.delta_sq, ours.gain, ours.weight_sq) == pytest.approx(
        (theirs.delta_sq, theirs.gain, theirs.weight_sq), rel=SAME_SUMS
    )


def test_what_does_not_fit_is_not_finite():
    assert not measure_rounding(np.full((1, 1), 65000.0, np.float32), np.full((1, 1), 1000.0), "F16").is_finite
