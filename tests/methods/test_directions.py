"""Directions of a domain beside general text, held against SciPy's generalised eigenvectors."""

import numpy as np
import scipy.linalg
import torch

from portllm.methods.directions import EPSILON, Weighted, domain_directions

WIDTH = 12


def inputs(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(400, WIDTH, generator=generator) * torch.tensor(sizes)


DOMAIN = inputs(0, [3.0, 2.0, *[1.0] * (WIDTH - 2)])
GENERAL = inputs(1, [3.0, 0.1, *[1.0] * (WIDTH - 2)])
WEIGHT = torch.rand(400, generator=torch.Generator().manual_seed(2))
GENERAL_ALL = [Weighted(GENERAL, torch.ones(len(GENERAL)))]


def parted(inputs, weight):
    """Weighted as they come, some tokens at a time."""
    return [Weighted(x, of) for x, of in zip(inputs.split(150), weight.split(150), strict=True)]


def test_they_are_the_generalised_eigenvectors_of_the_mean_products():
    found = domain_directions(parted(DOMAIN, WEIGHT), GENERAL_ALL, 3).double()
    domain, general, weight = (each.double().numpy() for each in (DOMAIN, GENERAL, WEIGHT))
    here = (domain.T * weight) @ domain / weight.sum()
    there = general.T @ general / len(general)
    floor = EPSILON * (np.trace(here) + np.trace(there)) / WIDTH
    expected = scipy.linalg.eigh(here, there + floor * np.eye(WIDTH))[1][:, ::-1][:, :3].T
    cosines = (found.numpy() * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)


def test_the_first_is_what_the_domain_has_and_general_text_lacks_not_what_is_largest():
    assert domain_directions(parted(DOMAIN, WEIGHT), GENERAL_ALL, 1)[0].abs().argmax() == 1
    assert domain_directions(parted(DOMAIN, WEIGHT), [], 1)[0].abs().argmax() == 0


def test_each_reads_a_mean_square_of_one_on_the_domain():
    read = DOMAIN @ domain_directions(parted(DOMAIN, WEIGHT), GENERAL_ALL, 4).T
    torch.testing.assert_close((read.pow(2) * WEIGHT[:, None]).sum(dim=0) / WEIGHT.sum(), torch.ones(4))


def test_there_are_no_more_than_inputs_are_wide():
    assert domain_directions(parted(DOMAIN, WEIGHT), GENERAL_ALL, 40).shape == (WIDTH, WIDTH)
    assert domain_directions(parted(torch.zeros_like(DOMAIN), WEIGHT), GENERAL_ALL, 2).isfinite().all()
