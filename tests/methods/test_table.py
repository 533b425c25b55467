"""Every row of METHODS keeps the contract of a port method."""

import re

import pytest
import torch

from portllm.errors import UnknownMethodError
from portllm.methods.table import METHODS, method_named
from portllm.patch.delta import LowRankDelta


@pytest.fixture
def delta():
    generator = torch.Generator().manual_seed(0)
    return LowRankDelta(a=torch.randn(4, 12, generator=generator), b=torch.randn(18, 4, generator=generator), scale=1.5)


def dense(delta):
    return delta.scale * (delta.b.double() @ delta.a.double())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_identity_without_drift(method, delta):
    assert dense(METHODS[method].port(delta)).equal(dense(delta))


@pytest.mark.parametrize("method", METHODS)
def test_no_method_touches_its_input(method, delta):
    a, b = delta.a.clone(), delta.b.clone()
    METHODS[method].port(delta)
    assert delta.a.equal(a)
    assert delta.b.equal(b)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_twice(method, delta):
    assert dense(METHODS[method].port(delta)).equal(dense(METHODS[method].port(delta)))


@pytest.mark.parametrize("method", METHODS)
def test_every_row_says_what_it_is(method):
    row = METHODS[method]
    assert row.id == method == method_named(method).id
    assert re.fullmatch(r"[a-z][a-z0-9-]*", row.id)
    assert row.summary
    assert "arXiv" in row.reference


@pytest.mark.parametrize("method", METHODS)
def test_factors_that_are_still_on_disk_will_do(method):
    class OnDisk:
        def __init__(self, *shape):
            self.shape = shape

    delta = LowRankDelta(a=OnDisk(4, 12), b=OnDisk(18, 4), scale=1.5)
    ported = METHODS[method].port(delta)
    assert (ported.shape, ported.rank, ported.scale) == ((18, 12), 4, 1.5)


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UnknownMethodError, match=r"'teleport': is no port method\. There are: add"):
        method_named("teleport")
