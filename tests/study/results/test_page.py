"""The page of a study has every table of its Markdown page, and pictures of the same numbers."""

import math
from collections import Counter
from dataclasses import replace

from portllm.show.numbers import percent
from portllm.study.definition.plan import steps_of
from portllm.study.parts.theory import TheorySettings
from portllm.study.results.markdown import COMPARED, parts_of, render_page, retention_text
from portllm.study.results.page import study_page
from portllm.study.results.table import tabulate
from tests.show.html.reading import EVIL, Page, with_texts
from tests.study.definition.test_plan import STUDY
from tests.study.results.test_table import results_of

WITH_THEORY = replace(STUDY, theory=TheorySettings(), compare=("paper-mistral-7b", "temporal-mistral-7b-fineweb"))
RESULTS = tabulate(WITH_THEORY, {step: results_of(step) for step in steps_of(WITH_THEORY)})
PAGE = Page(study_page(RESULTS))


def markdown_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_table_of_the_markdown_page_is_on_it():
    shown = [table for name, table in PAGE.tables.items() if not name.endswith(", in numbers")]
    rows = []
    for table in shown:
        if table[0][1] == COMPARED[0]:  # what does not fit beside the scores stands below them
            rows[-len(table) :] = [[*row, *rest[1:]] for row, rest in zip(rows[-len(table) :], table, strict=True)]
        else:
            rows += table
    assert rows == markdown_rows(render_page(RESULTS))


def test_every_text_of_the_markdown_page_is_on_it():
    for part in [*parts_of(RESULTS)][1:]:  # what the first says stands at the top, by name
        assert all(block in PAGE.texts for block in part.blocks if isinstance(block, str))


def test_a_study_that_is_not_finished_says_so_first():
    page = Page(study_page(tabulate(STUDY, {})))
    texts = [text for text in page.texts if text.strip()]
    assert texts[texts.index("? ") + 1] == f"Not finished: 0 of {len(steps_of(STUDY))} steps are done"
    assert not any(name.endswith("in numbers") for name in page.tables)


def test_the_headline_of_a_finished_study_counts_wins_and_losses_and_names_the_worst():
    ends = Counter(row.outcome for row in RESULTS.tasks)
    assert min(ends["level"], ends["behind"]) > 0
    said = (
        f"Of 8 ports, {ends['level']} level with retraining in accuracy, {ends['ahead']} ahead, {ends['behind']} behind"
    )
    assert said in PAGE.texts
    behind = min(row.behind.value for row in RESULTS.tasks)
    assert any(text.startswith(f"{abs(100 * behind):.1f} points ") and " at worst (" in text for text in PAGE.texts)


def test_what_stands_beside_ports_is_not_counted_among_them():
    rivals = tuple(replace(row, method="random", outcome="behind") for row in RESULTS.tasks)
    page = Page(study_page(replace(RESULTS, tasks=(*RESULTS.tasks, *rivals))))
    assert any(text.startswith("Of 8 ports, ") for text in page.texts)


def test_where_nothing_is_learned_the_headline_says_so_and_names_no_worst():
    nothing = tuple(replace(row, outcome="nothing learned") for row in RESULTS.tasks)
    page = Page(study_page(replace(RESULTS, tasks=nothing)))
    assert "In accuracy, retraining learns nothing that any of 8 ports could keep" in page.texts
    assert not any(" at worst (" in text for text in page.texts)


def test_below_it_stands_between_what_retention_lies():
    values = [row.loss_retention.value for row in RESULTS.tasks]
    assert f"retention in loss: {min(values):.2f} to {max(values):.2f} over 8 ports" in PAGE.texts


def test_retention_that_is_no_number_is_counted_and_not_drawn():
    none = replace(RESULTS.tasks[0].loss_retention, value=None, low=None, high=None, reason="why")
    tasks = (replace(RESULTS.tasks[0], loss_retention=none), *RESULTS.tasks[1:])
    page = Page(study_page(replace(RESULTS, tasks=tasks)))
    assert any(text.endswith("over 7 ports; undefined for 1") for text in page.texts)
    assert page.tables["Retention, a, in numbers"][1] == [
        "chain 1, add",
        retention_text(tasks[0].accuracy_retention),
        "no number",
    ]


def test_an_interval_without_an_end_is_drawn_all_the_same():
    open_ended = replace(RESULTS.tasks[0].loss_retention, low=-math.inf, high=math.inf)
    tasks = (replace(RESULTS.tasks[0], loss_retention=open_ended), *RESULTS.tasks[1:])
    text = study_page(replace(RESULTS, tasks=tasks))
    assert "nan" not in text.lower().replace("finance", "")
    assert 'd="M8.0 ' in text


def test_the_bars_are_those_of_json():
    rows = PAGE.tables["Accuracy, a, in numbers"]
    assert rows[0] == ["update", "model", "accuracy in percent"]
    told = RESULTS.to_json()["tasks"][0]["scored"]
    by_name = {(row[0], row[1]): row[2] for row in rows[1:]}
    share = told["ported"]["accuracy"]["value"]
    assert by_name["chain 1, add", "evolved + ported"].startswith(f"{100 * share:.1f} ± ")
    assert percent(share) in PAGE.texts
    assert by_name["", "base"].startswith(f"{100 * told['base']['accuracy']['value']:.1f} [")


def test_a_chain_has_a_curve_and_a_single_update_has_none():
    chains = {name for name in PAGE.tables if name.endswith(", add, in numbers")}
    assert chains == {"a, chain, add, in numbers", "b-c, chain, add, in numbers"}
    assert [row[0] for row in PAGE.tables["a, chain, add, in numbers"][1:]] == ["1", "2", "3"]


def test_the_spectra_are_those_of_json():
    spectra = RESULTS.to_json()["tasks"][0]["spectra"]
    rows = PAGE.tables["a, chain 1, in numbers"]
    assert rows[0] == ["singular value", "ported", "retrained", "residual"]
    assert [row[3] for row in rows[1:]] == [f"{value:.3g}" for value in spectra["residual"]]


def test_no_name_in_a_study_is_markup():
    def page(text):
        tasks = tuple(
            replace(row, evolution=row.evolution + text, task=row.task + text, method=row.method + text)
            for row in RESULTS.tasks
        )
        models = with_texts(RESULTS.models, text)
        return Page(study_page(replace(RESULTS, title=text, base=text, tasks=tasks, models=models)))

    assert page(EVIL).skeleton == page("x").skeleton
