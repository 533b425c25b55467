"""What undoes an update on a domain, held against the same least squares in full, by NumPy and SciPy."""

import numpy as np
import scipy.linalg
import torch

from portllm.methods.undoing import RIDGE, Span, Weighted

WIDTH, OUT = 12, 9


def inputs(seed, sizes, n=400):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator) * torch.tensor(sizes)


DOMAIN = inputs(0, [3.0, 2.0, *[1.0] * (WIDTH - 2)])
GENERAL = inputs(1, [3.0, 0.1, *[1.0] * (WIDTH - 2)])
WEIGHT = torch.rand(400, generator=torch.Generator().manual_seed(2))
DRIFT = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(3))
EVERYWHERE = [Weighted(GENERAL, torch.ones(400))]


def parted(x, weight):
    """Inputs as they come, some tokens at a time."""
    return [Weighted(some, of) for some, of in zip(x.split(150), weight.split(150), strict=True)]


def loss(change):
    """What the map is to make least."""
    x, general, weight = (each.double().numpy() for each in (DOMAIN, GENERAL, WEIGHT))
    ridge = RIDGE * (x.T * weight @ x).trace() / WIDTH
    here = (weight[:, None] * (x @ (DRIFT.double().numpy() + change).T) ** 2).sum()
    return here + ((general @ change.T) ** 2).sum() + ridge * (change**2).sum()


def test_it_is_the_best_map_of_its_rank():
    x, general, weight = (each.double().numpy() for each in (DOMAIN, GENERAL, WEIGHT))
    here, there = x.T * weight @ x, general.T @ general
    both = here + there + RIDGE * here.trace() / WIDTH * np.eye(WIDTH)
    best = -DRIFT.double().numpy() @ here @ np.linalg.inv(both)
    root = scipy.linalg.sqrtm(both)
    u, s, v = np.linalg.svd(best @ root)
    for count in (1, 3, OUT):
        factors = Span.of(parted(DOMAIN, WEIGHT), EVERYWHERE).undoing(DRIFT, count)
        expected = (u[:, :count] * s[:count]) @ v[:count] @ np.linalg.inv(root)
        found = (factors.b.double() @ factors.a.double()).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert loss(found) < loss(0 * found)


def test_without_general_text_and_with_rank_enough_the_update_is_undone_on_the_domain():
    factors = Span.of(parted(DOMAIN, WEIGHT), []).undoing(DRIFT, WIDTH)
    moved, left = DOMAIN @ DRIFT.T, DOMAIN @ (DRIFT + factors.b @ factors.a).T
    assert left.norm() < 0.05 * moved.norm()


def test_of_a_direction_that_general_text_has_too_less_is_undone():
    alone, beside = (Span.of(parted(DOMAIN, WEIGHT), general).undoing(DRIFT, WIDTH) for general in ([], EVERYWHERE))
    undone = [(factors.b @ factors.a)[:, :2].norm(dim=0) / DRIFT[:, :2].norm(dim=0) for factors in (alone, beside)]
    assert undone[1][0] < 0.5 * undone[0][0]
    assert undone[1][1] > 0.9 * undone[0][1]


def test_without_drift_or_inputs_nothing_is_done():
    for drift, x in ((0 * DRIFT, DOMAIN), (DRIFT, 0 * DOMAIN)):
        factors = Span.of(parted(x, WEIGHT), EVERYWHERE).undoing(drift, 3)
        assert (factors.b @ factors.a).abs().max() == 0
