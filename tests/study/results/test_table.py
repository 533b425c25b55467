"""The table follows from the rows: means, spreads, intervals, retention and flips, and a page of them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from portllm.evaluating.metrics import Retention, retention
from portllm.study.definition.estimate import estimate
from portllm.study.definition.plan import Step, steps_of
from portllm.study.parts.check import CheckSettings
from portllm.study.parts.theory import TheorySettings
from portllm.study.results.markdown import outcome_lines, render_page
from portllm.study.results.table import commonest_right, tabulate
from tests.study.definition.test_plan import STUDY

RIGHT = {None: 0.2, "patched": 0.9, "add": 0.8, "align": 0.8, "retrained": 0.9}
"""Share of rows that are right, by the patch that is on."""


def results_of(step):
    """What a step found: rows seeded by its name."""
    generator = np.random.default_rng(list(step.name.encode()))
    match step.kind:
        case "score":
            right = (generator.random(60) < RIGHT[step.patch]).tolist()
            losses = (2 - np.array(right) + generator.random(60) / 9).tolist()
            return {"correct": right, "losses": losses, "answers": ["yes" if hit else "no" for hit in right]}
        case "drift":
            return {"relative": 0.01, "cosine": 0.9999}
        case "read":
            return {"nats": float(generator.random()), "perplexity": 1.0, "n_tokens": 10}
        case "check":
            seed = step.seed or 0
            text = {"cka": 0.5} if seed else {}
            return {"verdict": "holds", "reasons": [], "weights": {"drift": 0.1 + seed / 100}, "text": text}
        case "theory":
            ratio = 0.5 + (step.seed or 0) / 10
            total = {"of_delta": {"frobenius": ratio}, "of_update": {"frobenius": ratio / 100}}
            module = {kind: {"singular_values": [3.0 * ratio, ratio]} for kind in ("ported", "retrained", "residual")}
            return {"residual": {"total": total, "modules": {"q": module, "k": module}}}
        case _:
            return {}


FOUND = {step: results_of(step) for step in steps_of(STUDY)}

RESULTS = tabulate(STUDY, FOUND)


def column(model, task, patch, field, seeds=(0, 5)):
    names = [Step("score", model, task=task, seed=seed, patch=patch) for seed in (seeds if patch else (None,))]
    by_name = {step.name: found for step, found in FOUND.items()}
    return np.array([by_name[name.name][field] for name in names], dtype=float)


def test_the_commonest_answer_of_each_model_stands_with_its_share():
    row = RESULTS.tasks[1]
    share = column("chain.2", "a", "add", "correct").mean()
    assert row.scored["ported"].answers == {"yes": pytest.approx(share), "no": pytest.approx(1 - share)}
    assert f"| yes: {100 * share:.0f} % |" in render_page(RESULTS)


def test_answers_that_are_texts_are_not_counted_but_measured():
    def texts(step):  # a model that says the same to all rows is beside others that write texts
        return ["no idea"] * 60 if step.model == "base" else [f"it is {n}" for n in range(59)] + ["a short one is it"]

    found = {step: found | ({"answers": texts(step)} if step.kind == "score" else {}) for step, found in FOUND.items()}
    results = tabulate(STUDY, found)
    scored = results.tasks[0].scored
    assert {name: score.answers for name, score in scored.items()} == {name: {} for name in scored}
    assert scored["base"].words == 2.0
    assert scored["ported"].words == pytest.approx((59 * 3 + 5) / 60)
    page = render_page(results)
    assert "commonest answer" not in page
    assert "| words per answer | base |" in page
    assert "| 2.0 | 2.0 | 3.0 | 3.0 | 3.0 |" in page


def test_labels_have_no_length():
    assert {score.words for row in RESULTS.tasks for score in row.scored.values()} == {None}
    assert "words per answer" not in render_page(RESULTS)


def test_means_are_over_rows_and_seeds_and_the_spread_is_over_seeds():
    row = RESULTS.tasks[1]
    assert (row.evolution, row.link, row.task, row.method, row.seeds) == ("chain", 2, "a", "add", (0, 5))
    ported = column("chain.2", "a", "add", "correct")
    assert row.scored["ported"].accuracy.value == pytest.approx(ported.mean())
    assert row.scored["ported"].by_seed == pytest.approx(ported.mean(axis=1))
    assert row.scored["ported"].spread == pytest.approx(ported.mean(axis=1).std(ddof=1))
    assert row.scored["ported"].accuracy.low < ported.mean() < row.scored["ported"].accuracy.high
    assert row.scored["base"].spread is None
    assert row.scored["evolved"].loss.value == pytest.approx(column("chain.2", "a", None, "losses").mean())


def test_differences_retention_and_flips_are_of_the_same_rows():
    row = RESULTS.tasks[1]
    patched, ported = column("base", "a", "patched", "correct"), column("chain.2", "a", "add", "correct")
    retrained, evolved = column("chain.2", "a", "retrained", "correct"), column("chain.2", "a", None, "correct")
    assert row.change.value == pytest.approx((ported - patched).mean())
    assert row.behind.value == pytest.approx((ported - retrained).mean())
    assert row.negative_flips == pytest.approx(((patched > ported).sum(axis=1)).mean())
    means = {"ported": ported.mean(axis=0).tolist(), "retrained": retrained.mean(axis=0).tolist()}
    assert row.accuracy_retention == retention(evolved=evolved[0].tolist(), **means)
    gain = (ported.mean() - evolved.mean()) / (retrained.mean() - evolved.mean())
    assert row.accuracy_retention.value == pytest.approx(gain)
    assert row.loss_retention.value == pytest.approx(gain, abs=0.1)


def test_methods_are_compared_by_whose_answers_they_give_and_what_they_cost():
    study = replace(STUDY, methods=("add", "align"))
    found = {
        step: results_of(replace(step, patch="add") if step.kind == "score" and step.patch == "align" else step)
        | ({"general_nats_ported": 4.0 + (step.seed or 0)} if step.kind == "port" and step.patch == "align" else {})
        for step in steps_of(study)
    }
    results = tabulate(study, found)
    row = next(row for row in results.tasks if row.method == "align")
    by_name = {step.name: result for step, result in found.items()}
    said = [
        [by_name[Step("score", model, task=row.task, seed=seed, patch=patch).name]["answers"] for seed in (0, 5)]
        for model, patch in (("base", "patched"), (f"{row.evolution}.{row.link}", "align"))
    ]
    same = np.mean([[one == other for one, other in zip(*pair, strict=True)] for pair in zip(*said, strict=True)])
    assert row.agreement.value == pytest.approx(same)
    assert row.measured == {"general_nats_ported": 6.5}
    page = render_page(results)
    assert f"| chain 1, align | +0.0 [0.0, 0.0] | {100 * same:.1f} " in page
    assert "| answers as base + patch, % | ported, nats per token |" in page, "what no port measured is no column"
    assert "6.500 |" in page
    measured = {"general_nats_ported": 6.5, "token_agreement": 0.978}
    written = [replace(each, measured=measured if each == row else {}) for each in results.tasks]
    assert "| 97.8 | 6.500 |" in render_page(replace(results, tasks=tuple(written)))
    assert "answers as base + patch" not in render_page(RESULTS)


def test_checks_are_means_over_seeds_of_what_all_of_them_measured():
    assert {row.checked for row in RESULTS.tasks} == {None}
    study = replace(STUDY, check=CheckSettings())
    row = tabulate(study, {step: results_of(step) for step in steps_of(study)}).tasks[0]
    assert row.checked.verdicts == ("holds", "holds")
    assert row.checked.weights == {"drift": pytest.approx(0.125)}
    assert row.checked.text == {}


def test_residuals_are_means_over_seeds_where_theory_is_measured():
    assert {row.residual_of_delta for row in RESULTS.tasks} == {None}
    study = replace(STUDY, theory=TheorySettings())
    some = {step: results_of(step) for step in steps_of(study) if step.kind == "theory" and step.model == "chain.2"}
    results = tabulate(study, some)
    assert results.tasks[1].residual_of_delta == pytest.approx((0.5 + 1.0) / 2)
    assert results.tasks[1].residual_of_update == pytest.approx((0.5 + 1.0) / 200)
    assert results.tasks[0].residual_of_delta is None
    assert "| chain 2 | a | 0.750 | 7.50e-03 |" in render_page(results)
    assert "Port residual" not in render_page(RESULTS)


def test_spectra_are_mean_squares_over_modules_and_seeds():
    study = replace(STUDY, theory=TheorySettings())
    found = {step: results_of(step) for step in steps_of(study) if step.kind == "theory" and step.model == "chain.2"}
    row = tabulate(study, found).tasks[1]
    assert row.spectra.residual == pytest.approx((3 * (0.625**0.5), 0.625**0.5))  # seeds 0 and 5: ratios 0.5 and 1.0
    assert RESULTS.tasks[1].spectra is None


def test_seeds_that_are_not_done_are_left_out_and_nothing_is_invented():
    some = {step: found for step, found in FOUND.items() if step.name != "score_chain.1_a_s5_retrained"}
    row = tabulate(STUDY, some).tasks[0]
    assert (row.seeds, len(row.scored["retrained"].by_seed)) == ((0,), 1)
    nothing = tabulate(STUDY, {})
    assert nothing.n_done == 0
    assert {row.change for row in nothing.tasks} == {row.drift for row in nothing.models} == {None}
    assert {len(row.scored) for row in nothing.tasks} == {0}


def test_results_are_json_without_infinities():
    same = {step: {**found, "correct": [True] * 30 + [False] * 30} if "correct" in found else found
            for step, found in FOUND.items()}  # fmt: skip
    flat = tabulate(STUDY, same)
    for results in (RESULTS, flat, tabulate(STUDY, {})):
        assert json.loads(json.dumps(results.to_json(), allow_nan=False))["n_done"] == results.n_done
    assert flat.tasks[0].accuracy_retention.value is None


def test_the_page_has_a_line_for_every_row_and_a_curve_for_every_chain():
    page = render_page(RESULTS).splitlines()
    assert page[0] == "# A study"
    assert sum(line.startswith("| chain 2, add |") for line in page) == 3 * 2  # accuracy, loss, answers of two tasks
    assert sum(line.startswith("| chain | b-c, add | loss |") for line in page) == 1
    assert not any(line.startswith("| old | a, add |") for line in page)  # one link is no chain
    tables = [line for line in page if line.startswith("|")]
    assert not any("nan" in line or "inf" in line or "None" in line for line in tables)
    assert not any("Published" in line for line in page)


def test_a_page_of_a_study_that_is_not_finished_says_so():
    page = render_page(tabulate(STUDY, {}))
    assert f"Not finished: 0 of {len(FOUND)} steps are done." in page


def test_published_numbers_stand_beside_with_their_provenance():
    page = render_page(replace(RESULTS, compare="paper-mistral-7b"))
    assert "Second-hand" in page
    assert "| gsm8k | published |  |  | 15.16 | 41.32 | 34.95 |" in page
    renamed = tuple(replace(row, task="gsm8k") if row.task == "a" else row for row in RESULTS.tasks)
    beside = render_page(replace(RESULTS, compare="paper-mistral-7b", tasks=renamed)).partition("15.16")[2]
    ported = RESULTS.tasks[0].scored["ported"].accuracy.value
    assert f"| here: chain 1, add | {100 * RESULTS.tasks[0].scored['base'].accuracy.value:.2f} |" in beside
    assert f"| {100 * ported:.2f} |" in beside.partition("here: chain 1, add")[2].partition("here:")[0]


def with_scores(change, tasks=("a",), evolutions=("old",), methods=("add",)):
    """Results of a part of the study in which a change was made to what each score step found."""
    study = replace(
        STUDY,
        seeds=(0,),
        retrain_seeds=(8,),
        methods=methods,
        tasks={name: STUDY.tasks[name] for name in tasks},
        evolutions={name: STUDY.evolutions[name] for name in evolutions},
    )
    found = {step: results_of(step) for step in steps_of(study)}
    return tabulate(study, {step: change(step, each) if step.kind == "score" else each for step, each in found.items()})


def as_right(found, shares):
    """Found scores with the first so many rows right."""
    return found | {"correct": [row < round(60 * shares) for row in range(60)]}


@pytest.mark.parametrize(
    ("evolved", "ported", "retrained", "outcome"),
    [
        (0.2, 0.8, 0.8, "level"),
        (0.2, 0.5, 0.8, "behind"),
        (0.2, 0.9, 0.6, "ahead"),
        (0.5, 0.5, 0.5, "nothing learned"),
        (0.5, 0.2, 0.5, "nothing learned"),
    ],
)
def test_a_port_is_level_ahead_or_behind_unless_retraining_gains_nothing(evolved, ported, retrained, outcome):
    shares = {None: evolved, "patched": retrained, "add": ported, "retrained": retrained}
    results = with_scores(lambda step, found: as_right(found, shares[step.patch]))
    assert [row.outcome for row in results.tasks] == [outcome]
    assert results.tasks[0].gain.value == pytest.approx(retrained - evolved)
    page = render_page(results)
    difference = results.tasks[0].gain if outcome == "nothing learned" else results.tasks[0].behind
    commonest = "" if results.tasks[0].commonest is None else f"{100 * results.tasks[0].commonest:.1f}"
    assert f"| a | 60 | {commonest} | old 1, add |" in page
    assert f"| {outcome}, {100 * difference.value:+.1f} [" in page


def test_the_commonest_right_answer_is_told_where_models_give_the_right_ones_away():
    found = [
        {"answers": ["a", "a", "b", "b"], "correct": [True, False, True, False]},
        {"answers": ["a", "b", "b", "b"], "correct": [True, True, True, False]},
    ]
    assert commonest_right(found) == 0.5  # the last row was never right, so of two answers it is the other
    assert commonest_right([*found, {"answers": ["c"] * 4, "correct": [False] * 4}]) is None
    assert commonest_right([{"answers": [f"text {n}" for n in range(40)], "correct": [True] * 40}]) is None
    assert commonest_right([]) is None


def test_ports_are_counted_by_their_ends_and_what_learned_nothing_is_neither_won_nor_lost():
    def change(step, found):
        if step.task == "b-c":
            return as_right(found, 0.5)
        shares = {None: 0.2, "patched": 0.8, "add": 0.4 if step.model == "old.1" else 0.8, "retrained": 0.8}
        return as_right(found, shares[step.patch])

    won = "of 4 ports, 3 level with retraining in accuracy, 0 ahead"
    lost = "1 behind (1 by more than another seed of retraining is)"
    counted = f"add: {won}, {lost}; for 4 more, retraining learns nothing that could be kept"
    assert counted in render_page(with_scores(change, tasks=("a", "b-c"), evolutions=("chain", "old")))
    nothing = with_scores(lambda step, found: as_right(found, 0.5))
    assert "add: in accuracy, retraining learns nothing that any of 1 ports could keep" in render_page(nothing)


def test_the_outcome_says_what_is_kept_in_loss_on_average_and_at_least():
    results = with_scores(lambda step, found: as_right(found, 0.5), methods=("add",))
    kept = [Retention(0.5, 0.4, 0.6), Retention(None, None, None, "why"), Retention(1.0, 0.9, 1.1)]
    rows = [replace(results.tasks[0], loss_retention=each) for each in kept]
    assert outcome_lines(rows)[0].endswith("; 0.75 of retraining's gain in loss kept (0.50 at least)")
    assert "gain in loss" not in outcome_lines(rows[1:2])[0]
    none = [replace(rows[0], loss_retention=Retention(-0.001, -0.1, 0.1))]
    assert outcome_lines(none)[0].endswith("; 0.00 of retraining's gain in loss kept (0.00 at least)")


def test_a_method_beside_addition_says_by_how_much_it_is_better():
    shares = {None: 0.2, "add": 0.5, "align": 0.8}
    results = with_scores(lambda step, found: as_right(found, shares.get(step.patch, 0.9)), methods=("add", "align"))
    assert [row.over_add and row.over_add.value for row in results.tasks] == [None, pytest.approx(0.3)]
    page = render_page(results)
    assert "| old 1, align | +30.0 [" in page
    assert "; against addition +30.0 points on average, better for 1 of 1, worse for 0" in page
    assert page.count("against addition") == 1
    kept = [100 * row.agreement.value for row in results.tasks]
    assert [
        f"; {share:.1f} % of the rows answered as by base + patch ({share:.1f} at least)" in page for share in kept
    ] == [
        True,
        True,
    ]


@pytest.mark.parametrize(("ported", "beyond"), [(0.6, 1), (0.75, 0)])
def test_a_port_that_is_behind_is_told_from_one_that_luck_alone_would_put_there(ported, beyond):
    shares = {None: 0.2, "patched": 0.9, "add": ported}
    retrained = {0: 0.9, 8: 0.7}
    results = with_scores(lambda step, found: as_right(found, shares.get(step.patch) or retrained[step.seed]))
    assert f"1 behind ({beyond} by more than another seed of retraining is)" in render_page(results)


def test_luck_is_the_difference_of_patches_that_were_retrained_with_other_seeds():
    results = with_scores(lambda step, found: as_right(found, 0.7 if step.seed == 8 else 0.9))
    row = results.tasks[0]
    assert row.luck.value == pytest.approx(-0.2)
    assert row.scored["again"].by_seed == pytest.approx((0.7,))
    assert row.behind.value == 0
    page = render_page(results)
    assert "| retrained again |" in page
    assert RESULTS.tasks[0].luck is None
    assert "retrained again" not in render_page(RESULTS).lower()
    assert "again - retrained" not in render_page(RESULTS)


def test_steps_are_estimated_by_those_of_their_kind_and_task():
    done = {Step("score", "base", task="a"): 1.0, Step("score", "base", task="b-c"): 5.0}
    left = [Step("score", "chain.1", task="a"), Step("score", "chain.1", task="c"), Step("drift", "chain.1")]
    estimated = estimate(left, done)
    assert (estimated.seconds, estimated.n_unknown) == (1.0 + 3.0, 1)
