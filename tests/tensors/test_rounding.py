"""Rounding in numpy, against torch's."""

import numpy as np
import pytest
import torch

from portllm.tensors.rounding import round_to
from portllm.tensors.tensors import TORCH_DTYPES

HARD = [0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, 65520.0, 65519.0, 6e-8, 1e-40, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_that_of_torch(dtype):
    values = np.concatenate([HARD, np.random.default_rng(0).normal(size=5000) * 10.0 ** np.arange(-10, 10).repeat(250)])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(TORCH_DTYPES[dtype]).float().numpy()
    np.testing.assert_array_equal(round_to(values, dtype), expected)
