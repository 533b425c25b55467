"""What a storage dtype keeps, against the measures of a merge."""

import numpy as np
import pytest
import torch

from portllm.assess.kept_gain import STORED_AS, measure_rounding
from portllm.checkpoint.tensors import TORCH_DTYPES
from portllm.patch.merge import measure_merge

SAME_SUMS = 1e-5
"""Sums in float64 here, row by row in float32 in a merge."""


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_measures_are_those_of_a_merge(dtype, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator).to(torch.bfloat16)
    delta = size * torch.randn(8, 40, generator=generator)
    merged = (weight.float() + delta).to(TORCH_DTYPES[dtype])
    theirs = measure_merge(weight, delta, merged)
    ours = measure_rounding(weight.float().numpy(), delta.numpy())[dtype]
    assert (ours.delta_sq, ours.gain, ours.weight_sq) == pytest.approx(
        (theirs.delta_sq, theirs.gain, theirs.weight_sq), rel=SAME_SUMS
    )


def test_what_does_not_fit_is_not_finite():
    found = measure_rounding(np.full((1, 1), 65000.0, np.float32), np.full((1, 1), 1000.0))
    assert {dtype: sums.is_finite for dtype, sums in found.items()} == {"BF16": True, "F16": False, "F32": True}
