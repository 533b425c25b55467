"""The noise of rounding, against noise that was really rounded."""

import math

import pytest
import torch

from portllm.patch.noise_edge import noise_edge, rounding_variance

STORED = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def uneven(m, n, *, seed=0, spread=1.0):
    """Weights whose rows and columns have sizes of their own, as those of real models do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(spread * torch.randn(m, 1, generator=generator))
    columns = torch.exp(spread * torch.randn(1, n, generator=generator))
    return 0.02 * rows * columns * torch.randn(m, n, generator=generator)


def edge_of(*stored):
    variance = sum(rounding_variance(part).double() for part in stored)
    return noise_edge(variance.sum(dim=1), variance.sum(dim=0))


@pytest.mark.parametrize("dtype", STORED)
def test_the_variance_is_that_of_the_step_to_the_next_number(dtype):
    values = torch.tensor([[1.0, 1.5, -3.0, 0.02, 1000.0]], dtype=torch.float64).to(dtype)
    values[0, 1] += torch.finfo(dtype).eps  # no float32 that bfloat16 holds
    magnitude = values.abs()
    step = (torch.nextafter(magnitude, torch.full_like(magnitude, math.inf)) - magnitude).double()
    assert torch.allclose(rounding_variance(values).double() * 12, step.square(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variance_of_what_was_rounded_is_the_predicted_one(dtype):
    values = 0.02 * torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    stored = values.to(dtype)
    measured = (stored.float() - values).square().sum().item()
    assert rounding_variance(stored).sum().item() == pytest.approx(measured, rel=0.02)


def test_float32_that_bfloat16_holds_has_the_steps_of_bfloat16():
    stored = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(rounding_variance(stored.float()), rounding_variance(stored))


def test_a_zero_has_next_to_no_noise():
    assert rounding_variance(torch.zeros(1, 1, dtype=torch.float16)).item() == pytest.approx(2.0**-48 / 12)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (20, 50), (40, 40)])
def test_even_noise_has_the_edge_of_marchenko_and_pastur(shape):
    m, n = shape
    edge = noise_edge(torch.full((m,), 4.0 * n).double(), torch.full((n,), 4.0 * m).double())
    plain = 2.0 * (math.sqrt(m) + math.sqrt(n))
    assert plain < edge < 1.2 * plain


def test_no_noise_has_no_edge():
    assert noise_edge(torch.zeros(3).double(), torch.zeros(4).double()) == 0.0


def test_a_single_loud_row_sets_the_edge():
    rows = torch.ones(200).double()
    rows[0] = 10_000.0
    edge = noise_edge(rows, torch.full((300,), rows.sum().item() / 300).double())
    assert 100.0 < edge < 1.3 * math.sqrt(10_000.0 + 300.0)


def test_the_edge_scales_with_the_noise():
    rows, columns = torch.rand(30).double() + 0.1, torch.ones(20).double()
    columns *= rows.sum() / columns.sum()
    assert noise_edge(9 * rows, 9 * columns) == pytest.approx(3 * noise_edge(rows, columns))


@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (400, 400)])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_rounding_of_uneven_weights_ends_just_below_the_edge(shape, spread):
    values = uneven(*shape, spread=spread)
    # A change of some steps everywhere, or both files would be rounded alike and the noise would cancel.
    change = values * 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    base, tuned = values.to(torch.bfloat16), (values + change).to(torch.bfloat16)
    largest = torch.linalg.svdvals(tuned.double() - base.double() - change.double())[0].item()
    # Where a few rows and columns carry the noise, the equations for large matrices lie above what one draw has.
    assert (0.85 if spread == 0 else 0.7) < largest / edge_of(base, tuned) < 1.0


def test_one_variance_for_all_would_take_the_noise_of_uneven_weights_for_signal():
    values = uneven(400, 300, spread=0.5)
    stored = values.to(torch.bfloat16)
    noise = torch.linalg.svdvals(stored.double() - values.double())
    plain = rounding_variance(stored).mean().sqrt().item() * (math.sqrt(400) + math.sqrt(300))
    assert (noise > plain).sum() > 3
    assert (noise > edge_of(stored)).sum() == 0
