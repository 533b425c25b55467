"""Softmax over blocks of the vocabulary, against all logits at once in float64."""

import pytest
import torch

from portllm.measures.logit_blocks import Compared, Softmax

OLD, NEW = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)) * 30
BLOCKS = [(0, 4), (4, 5), (5, 11)]
CPU = torch.device("cpu")


def test_normalizer_and_likeliest_token_do_not_depend_on_the_blocks() -> None:
    softmax = Softmax(3, CPU)
    for start, stop in BLOCKS:
        softmax.add(start, NEW[:, start:stop].double())
    assert softmax.normalizer == pytest.approx(NEW.double().logsumexp(dim=1))
    assert softmax.likeliest.tolist() == NEW.argmax(dim=1).tolist()


def test_divergence_and_agreement_are_those_of_whole_distributions() -> None:
    streams = {"new": NEW, "same": OLD}
    compared = Compared(3, streams, CPU)
    for start, stop in BLOCKS:
        compared.add(start, OLD[:, start:stop], ((name, logits[:, start:stop]) for name, logits in streams.items()))
    log_p, log_q = (logits.double().log_softmax(dim=1) for logits in (OLD, NEW))
    nats, agrees = compared.results()["new"]
    assert nats == pytest.approx((log_p.exp() * (log_p - log_q)).sum(dim=1))
    assert agrees.tolist() == (OLD.argmax(dim=1) == NEW.argmax(dim=1)).tolist()
    assert compared.entropy == pytest.approx(-(log_p.exp() * log_p).sum(dim=1))
    nats, agrees = compared.results()["same"]
    assert nats == pytest.approx(torch.zeros(3), abs=1e-12)
    assert agrees.all()


def test_what_is_kept_between_blocks_stays_in_its_place() -> None:
    """Else small tensors come to lie between the large ones of a block, whose room can then not be used again."""
    softmax = Softmax(3, CPU)
    places = [kept.data_ptr() for kept in (softmax.most, softmax.sum, softmax.likeliest)]
    for start, stop in BLOCKS:
        softmax.add(start, NEW[:, start:stop].double())
    assert [kept.data_ptr() for kept in (softmax.most, softmax.sum, softmax.likeliest)] == places


def test_logits_that_are_given_in_float64_are_left_as_they_are() -> None:
    old, new = OLD.double(), NEW.double()
    Compared(3, ["new"], CPU).add(0, old, [("new", new)])
    assert old.equal(OLD.double())
    assert new.equal(NEW.double())
