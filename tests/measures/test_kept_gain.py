"""What a storage dtype keeps, against the measures of a merge."""

import numpy as np
import pytest
import torch

from portllm.measures import kept_gain
from portllm.measures.kept_gain import STORED_AS, measure_rounding
from portllm.patch.merge import measure_merge
from portllm.tensors.tensors import TORCH_DTYPES

SAME_SUMS = 1e-5
"""Products in float32 on both sides, over other rows."""


@pytest.fixture(params=["loops", "numpy"], autouse=True)
def without_loops(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(kept_gain, "kernels", None)
    elif kept_gain.kernels is None:
        pytest.skip("the loops were not built here")


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_measures_are_those_of_a_merge(dtype, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator).to(torch.bfloat16)
    delta = size * torch.randn(8, 40, generator=generator)
    merged = (weight.float() + delta).to(TORCH_DTYPES[dtype])
    theirs = measure_merge(weight, delta, merged)
    ours = measure_rounding(weight.float().numpy().reshape(1, -1), delta.numpy().reshape(1, -1))[0][dtype]
    assert (ours.delta_sq, ours.gain, ours.weight_sq) == pytest.approx(
        (theirs.delta_sq, theirs.gain, theirs.weight_sq), rel=SAME_SUMS
    )


def test_what_is_found_of_a_weight_does_not_depend_on_those_beside_it(monkeypatch):
    rng = np.random.default_rng(0)
    weights, deltas = (rng.normal(size=(7, 300)).astype(np.float32) for _ in range(2))
    monkeypatch.setattr(kept_gain, "TILE", 2 * 300)
    alone = [measure_rounding(weights[[row]], deltas[[row]])[0] for row in range(7)]
    assert measure_rounding(weights, deltas) == alone


def test_what_does_not_fit_is_not_finite():
    (found,) = measure_rounding(np.full((1, 1), 65000.0, np.float32), np.full((1, 1), 1000.0, np.float32))
    assert {dtype: sums.is_finite for dtype, sums in found.items()} == {"BF16": True, "F16": False, "F32": True}


def test_of_no_weights_nothing_is_found():
    assert measure_rounding(np.empty((0, 4), np.float32), np.empty((0, 4), np.float32)) == []
