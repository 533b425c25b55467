"""The page of certify: whether the bound is met, what it says and what not, and the answers that differ as text."""

import pytest
from msgspec.structs import replace

from portllm.certifying.bounds import least_inputs, plan_inputs
from portllm.certifying.certificate import ASSUMES
from portllm.certifying.certify import Disagreement
from portllm.certifying.page import certify_page
from portllm.files.record import encode
from portllm.show.numbers import points, upper_percent
from tests.certifying.test_certificate import FREE, WHOLE
from tests.show.html.reading import EVIL, Page, with_texts

DISAGREEMENTS = tuple(
    Disagreement(row=row, prompt=f"is {row} even?", before="yes", after="no", right="yes" if row % 2 else None)
    for row in WHOLE.differing
)
PAGE = Page(certify_page(WHOLE, DISAGREEMENTS))


def test_whether_the_bound_is_met_comes_first_and_then_what_is_claimed():
    shown = [text for text in PAGE.texts if text.strip()]
    bound = upper_percent(WHOLE.loss_bound)
    assert shown[2:6] == [
        "✓ ",
        "met: the bound asked for is 20.00 %",
        f"score(ported) >= score(old specialist) - {bound}, with 95 % confidence",
        ASSUMES,
    ]
    missed = Page(certify_page(replace(WHOLE, wanted=0.001), DISAGREEMENTS))
    assert [text for text in missed.texts if text.strip()][2:4] == ["✗ ", "NOT met: the bound asked for is 0.10 %"]


def test_where_no_bound_was_asked_for_the_claim_comes_first():
    page = Page(certify_page(replace(WHOLE, wanted=None), DISAGREEMENTS))
    assert [text for text in page.texts if text.strip()][2].startswith("score(ported) >= ")


def test_the_numbers_are_those_of_json():
    told = encode(WHOLE)
    counted = dict(PAGE.tables["How many answers differ, in numbers"][1:])
    assert counted["answered otherwise"] == f"{told['k']} of {told['n']}; at most {upper_percent(told['bound'])}"
    labels = told["labels"]
    assert counted["turned wrong"] == f"{labels['negative_flips']} of 40; at most {upper_percent(labels['bound'])}"
    change = dict(PAGE.tables["Change of the score, in numbers"][1:])
    assert change["ported"] == f"{labels['ported_right']} of 40"
    assert f"({points(labels['change_low'])} to {points(labels['change_high'])})" in change["change"]


def test_other_bounds_have_the_numbers_of_a_plan():
    head, *rows = PAGE.tables["Inputs by bound"]
    assert head[2] == "inputs, if 7.5 % are answered otherwise"
    by_bound = {row[0]: row[1:] for row in rows}
    assert by_bound["20.00 %"] == [f"{least_inputs(0, 0.2)}", f"{plan_inputs(0.2, expected=3 / 40).n_inputs}"]
    assert by_bound["5.00 %"] == ["59", "no number: more differ than the bound allows"]
    assert by_bound["1.00 %"][0] == "299"


def test_an_expectation_that_is_too_near_to_the_bound_is_not_planned_for():
    near = replace(WHOLE, n=1000, differing=tuple(range(1, 50)), labels=None)
    rows = {row[0]: row for row in Page(certify_page(near, ())).tables["Inputs by bound"][1:]}
    assert rows["5.00 %"][2] == "too near to the bound"


def test_where_all_are_answered_alike_there_is_one_number_a_bound():
    alike = replace(WHOLE, differing=(), labels=None)
    assert Page(certify_page(alike, ())).tables["Inputs by bound"][0] == ["bound", "inputs, if all are answered alike"]


def test_the_answers_that_differ_can_be_read():
    start = PAGE.texts.index("Row 3")
    assert PAGE.texts[start : start + 8] == [
        "Row 3", "is 3 even?", "old specialist: ", "yes", "ported: ", "no", "right: ", "yes",
    ]  # fmt: skip


def test_free_text_says_that_no_bound_follows_and_claims_nothing():
    page = Page(certify_page(FREE, ()))
    assert [text for text in page.texts if text.strip()][2].startswith("no bound follows")
    assert not {"What is claimed", "Inputs by bound"} & {*page.texts, *page.tables}
    assert "90.0 % of the 100 that the specialist writes" in page.text


@pytest.mark.parametrize("certificate", [WHOLE, replace(WHOLE, wanted=None)])
def test_no_name_and_no_answer_is_markup(certificate):
    def page(text):
        named = replace(
            certificate,
            specialist=with_texts(WHOLE.specialist, text),
            ported=with_texts(WHOLE.ported, text),
            inputs=with_texts(WHOLE.inputs, text),
        )
        return Page(certify_page(named, with_texts(DISAGREEMENTS, text)))

    assert page(EVIL).skeleton == page("x").skeleton
