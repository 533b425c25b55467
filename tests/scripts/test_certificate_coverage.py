"""What the script says of certificates on rows that it is given."""

import pytest

from portllm.certifying.bounds import upper_bound
from scripts.certificate_coverage import DRAWS, INPUTS, measure, render


def scored(answers, right="a"):
    return {"answers": list(answers), "correct": [answer == right for answer in answers]}


def test_models_that_answer_alike_lose_nothing_and_every_bound_says_so():
    cell = measure(scored("ab" * 60), scored("ab" * 60), "cell", 0)
    assert (cell.answered_otherwise, cell.lost, cell.holds, cell.kept_aside) == (0, 0, 1, 1)
    assert cell.mean_bound == pytest.approx(upper_bound(0, INPUTS))


def test_a_claim_holds_more_often_than_its_bound_covers():
    old, new = "a" * 100 + "b" * 100, "a" * 80 + "b" * 20 + "c" * 60 + "a" * 40
    cell = measure(scored(old), scored(new), "cell", 0)
    assert cell.answered_otherwise == pytest.approx((20 + 60 + 40) / 200)
    assert cell.lost == pytest.approx((20 - 40) / 200)
    assert cell.holds >= cell.holds_for_answers >= 0.95 - 3 * (0.95 * 0.05 / DRAWS) ** 0.5


def test_a_claim_that_is_too_small_is_counted_as_broken(monkeypatch):
    monkeypatch.setattr("scripts.certificate_coverage.upper_bound", lambda k, n: 0.5 * k / n)
    assert measure(scored("a" * 100), scored("a" * 50 + "b" * 50), "cell", 0).holds < 0.05


def test_the_same_seed_draws_the_same_rows():
    old, new = scored("ab" * 60), scored("ab" * 50 + "aa" * 10)
    assert measure(old, new, "cell", 1) == measure(old, new, "cell", 1)
    assert measure(old, new, "cell", 1) != measure(old, new, "cell", 2)


def test_the_page_has_a_line_for_each_cell():
    cell = measure(scored("ab" * 60), scored("ab" * 60), "wiki.1, sst2, seed 0, add", 0)
    assert "| wiki.1, sst2, seed 0, add | 120 | 0.0 % | 0.0 % | 3.0 % | 100.0 % | 100.0 % | 100.0 % |" in render(
        "t", [cell]
    )
