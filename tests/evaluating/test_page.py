"""The page of evaluate: the port's score first, the numbers of JSON, and the rows that turned wrong as text."""

from dataclasses import replace

import pytest

from portllm.evaluating.compare import set_side_by_side
from portllm.evaluating.decision import decide
from portllm.evaluating.page import evaluate_page
from portllm.evaluating.scoring import Scores, Task
from portllm.evaluating.tables import comparison_notes
from portllm.running.examples import Example
from portllm.show.html.answered_rows import OPEN, SHOWN
from portllm.show.numbers import percent
from tests.show.html.reading import EVIL, Page

ROWS = 60
TASK = Task(
    examples=tuple(Example(f"question {row}?", "yes" if row % 2 else "no") for row in range(ROWS)), labels=("yes", "no")
)
RIGHT = {
    "base": 20,
    "base + patch": 55,
    "evolved": 18,
    "evolved + ported": 50,
    "evolved + ported, merged": 51,
    "evolved + retrained": 56,
}
"""How many of the first rows each model answers right."""


def scores(n_right, task=TASK):
    correct = tuple(row < n_right for row in range(ROWS))
    other = {"yes": "no", "no": "yes"}
    told = zip((example.completion for example in task.examples), correct, strict=True)
    return Scores(
        answers=tuple(answer if right else other.get(answer, "?") for answer, right in told),
        correct=correct,
        losses=tuple(0.1 + row % 3 if right else 2.0 + row % 5 for row, right in enumerate(correct)),
        n_cut_rows=3,
        seconds=1.0,
        metrics={"acc,none": n_right / ROWS},
    )


def compared(task=TASK, without=(), **changed):
    rows = {name: scores(count, task) for name, count in (RIGHT | changed).items() if name not in without}
    return set_side_by_side(rows, task)


def page_of(comparison, title):
    return evaluate_page(comparison, decide(comparison), title=title, about={"data": f"{title}.jsonl"})


COMPARISON = compared()
PAGE = Page(page_of(COMPARISON, title="patch from v1 to v2"))


def test_what_was_compared_comes_first_then_the_sentence_to_act_on_then_the_numbers_that_decide():
    assert PAGE.shown[1:4] == ["patch from v1 to v2", "data", "patch from v1 to v2.jsonl"]
    assert PAGE.shown[4] == (
        "Loses 8.3 points of accuracy (-16.2 to +0.1 with 95 % confidence) against before the update; 5 of 60 answers "
        "turned wrong."
    )
    assert any(text.startswith("evolved + ported: 83.3 % right, 91.7 % before the update") for text in PAGE.shown)
    at = PAGE.shown.index("Change in accuracy")
    assert PAGE.shown[at : at + 5] == [
        "Change in accuracy", "-8.3 points", "95 % interval -16.2 to +0.1", "Accuracy now", "83.3 %",
    ]  # fmt: skip
    wrong = PAGE.shown.index("Turned wrong")
    assert PAGE.shown[wrong + 1 : wrong + 3] == [
        "5 of 60", "0 turned right; a retrained patch turns 0 wrong",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n_right", "max_loss", "tone", "said"),
    [
        (55, 0.1, "good", "pass, limit: 10 points"),
        (50, 0.1, "doubt", "open, limit: 10 points"),
        (30, 0.1, "bad", "fail, limit: 10 points"),
    ],
)
def test_the_change_passes_or_fails_by_the_user_s_limit(n_right, max_loss, tone, said):
    comparison = compared(**{"evolved + ported": n_right, "evolved + ported, merged": n_right})
    headline = decide(comparison, max_loss=max_loss)
    page = Page(evaluate_page(comparison, headline, title="t", about={}, max_loss=max_loss))
    assert headline.tone == tone
    assert said in page.shown
    first = next(given["class"] for _, given in page.elements if given.get("class", "").startswith("tile "))
    assert first == f"tile {tone}"
    assert "your limit" in page.shown


def test_each_label_has_a_line_and_the_one_that_lost_most_comes_first():
    head, *rows = PAGE.tables["By label"]
    assert head == ["label", "rows", "before", "now", "change", "turned wrong", "turned right"]
    assert rows == [  # rows 51 to 55 turned wrong: three of them no, two of them yes
        ["no", "30", "93.3 %", "83.3 %", "-10.0", "3", "0"],
        ["yes", "30", "90.0 %", "83.3 %", "-6.7", "2", "0"],
    ]


def test_the_confusion_matrix_counts_answers_and_how_many_more_they_are_than_before():
    assert PAGE.tables["Confusion matrix"] == [
        ["right / answered", "yes", "no"],
        ["yes", "25 -2", "5 +2"],
        ["no", "5 +3", "25 -3"],
    ]


def test_of_many_labels_those_that_are_confused_are_listed():
    labels = tuple(f"label {number}" for number in range(20))
    examples = tuple(Example(f"question {row}?", labels[row % 20]) for row in range(ROWS))
    task = Task(examples=examples, labels=labels)
    before = scores(ROWS, task)
    after = replace(before, answers=(labels[5], *before.answers[1:]), correct=(False, *before.correct[1:]))
    rows = {"base": before, "base + patch": before, "evolved": before, "evolved + ported": after}
    page = Page(page_of(set_side_by_side(rows, task), title="t"))
    assert page.tables["Labels confused"][1:] == [["label 0", "label 5", "1", "0"]]
    assert "Confusion matrix" not in page.tables
    assert (len(page.tables["By label"]), len(page.tables["By label, the others"])) == (1 + 12, 1 + 8)


def test_text_that_is_generated_has_no_labels():
    page = Page(page_of(replace(COMPARISON, kind="text", labels=()), title="t"))
    assert not {"By label", "Confusion matrix", "Labels confused"} & page.tables.keys()


def test_the_numbers_are_those_of_json():
    header, *rows = PAGE.tables["Scores, losses, flips and retention"]
    by_name = {row[0]: dict(zip(header, row, strict=True)) for row in rows}

    def share(told):
        return f"{percent(told['value'])} ({100 * told['low']:.1f} to {100 * told['high']:.1f})" if told else ""

    for told in COMPARISON.to_json()["rows"]:
        row, loss = by_name[told["name"]], told["loss"]
        assert row["score"] == share(told["score"])
        assert row["same answer"] == share(told["agreement"])
        assert row["loss"] == f"{loss['value']:.3f} ({loss['low']:.3f} to {loss['high']:.3f})"
        flips, kept = told["flips"], told["score_retention"]
        assert row["negative flips"] == ("" if flips is None else f"{flips['negative']} of {flips['n_rows']}")
        assert row["retention: score"].startswith("" if kept is None else percent(kept["value"]))


def test_what_a_picture_shows_stands_beside_it():
    names = [row.name for row in COMPARISON.rows]
    for title in ("Accuracy", "Loss"):
        assert [row[0] for row in PAGE.tables[f"{title}, in numbers"][1:]] == names
    assert [row[0] for row in PAGE.tables["Retention, in numbers"][1:]] == [
        f"{name}, in {what}" for name in ("evolved + ported", "evolved + ported, merged") for what in ("score", "loss")
    ]


def test_the_rows_that_turned_wrong_can_be_read():
    turned = COMPARISON.turned_wrong("evolved + ported")
    assert [row.row for row in turned] == [51, 52, 53, 54, 55]
    start = PAGE.shown.index("Row 52")
    assert PAGE.shown[start : start + 10] == [
        "Row 52", "question 51?", "right", "yes", "base + patch", "yes", "evolved + ported", "no",
        "evolved + ported, merged", "no",
    ]  # fmt: skip
    assert PAGE.shown.count("Row 52") == 1


def test_an_answer_that_a_port_gives_far_more_often_is_named():
    evenly = comparison_notes(compared(**{"evolved + ported": 10}))  # half of those that turned wrong were yes, half no
    assert not any("balance" in said for said in evenly)
    patched = scores(55)
    all_yes = replace(patched, answers=("yes",) * ROWS, correct=tuple(row % 2 == 1 for row in range(ROWS)))
    rows = {"base": scores(20), "base + patch": patched, "evolved": scores(18), "evolved + ported": all_yes}
    (note,) = [said for said in comparison_notes(set_side_by_side(rows, TASK)) if "balance" in said]
    assert note.startswith("evolved + ported answers 'yes' in 100 % of the rows, base + patch in 48 %: ")


def test_of_many_such_rows_some_are_shown_and_the_others_counted():
    page = Page(page_of(compared(**{"evolved + ported": 10}), title="t"))
    assert any("evolved + ported: 45 of 60; evolved + ported, merged: 4 of 60." in text for text in page.texts)
    assert f"{SHOWN - OPEN} more" in page.texts
    assert f"{SHOWN} of 45 are shown." in page.texts
    assert len([text for text in page.texts if text.startswith("question ")]) == SHOWN


def test_a_long_prompt_loses_its_middle_and_says_so():
    long = replace(TASK.examples[50], prompt="begin" + "x" * 5000 + "end?")
    task = replace(TASK, examples=(*TASK.examples[:50], long, *TASK.examples[51:]))
    page = Page(page_of(compared(task), title="t"))
    shown = next(text for text in page.texts if text.startswith("beginx"))
    assert len(shown) < 1400
    assert "3709 characters omitted" in shown
    assert shown.endswith("xend?")


def test_another_port_stands_beside_the_first_and_does_not_change_what_decides():
    rival = "evolved + ported by align"
    page = Page(page_of(compared(**{rival: 40}), title="patch from v1 to v2"))
    names = [row[0] for row in page.tables["What the update cost, in numbers"][1:]]
    assert names == ["evolved + ported", rival, "evolved + ported, merged"]
    at = page.shown.index("Change in accuracy")
    assert page.shown[at : at + 3] == PAGE.shown[PAGE.shown.index("Change in accuracy") :][:3]
    assert page.tables["By label"] == PAGE.tables["By label"]
    start = page.shown.index("Row 41")  # which only the rival turns wrong
    assert page.shown[start + 6 : start + 10] == ["evolved + ported", "no", rival, "yes"]


def test_without_a_retrained_patch_nothing_is_said_of_retention():
    page = Page(page_of(compared(without=("evolved + retrained",)), title="t"))
    assert not any("etention" in head for head in page.tables["Scores, losses, flips and retention"][0])
    assert not any("n/a" in text for text in page.texts)
    assert "Retention, in numbers" not in page.tables


def test_the_harness_s_own_metrics_stand_on_the_page():
    assert any(text.startswith("acc,none of labels: base 0.3333") for text in PAGE.texts)


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_no_text_of_a_row_is_markup(field):
    def page(text):
        examples = tuple(replace(example, **{field: getattr(example, field) + text}) for example in TASK.examples)
        labels = ("yes", "no") if field == "prompt" else (f"yes{text}", f"no{text}")
        return Page(page_of(compared(replace(TASK, examples=examples, labels=labels)), title=text))

    assert page(EVIL).skeleton == page("x").skeleton
