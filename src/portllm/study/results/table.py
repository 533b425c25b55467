"""The study's results out of what its steps found: scores of each model on each task, and retention. Pure.

Rows are paired: row `i` is the same row for every model and seed. A model's column is the mean over seeds, row by row.
Intervals are over rows, those of differences and ratios by a bootstrap that draws the same rows for all models; seeds
show as a spread of their own.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from operator import eq
from statistics import fmean, stdev
from typing import Any

from portllm.evaluating.metrics import Estimate, accuracy, flips, mean_loss, mean_words, paired_change, retention
from portllm.study.definition.plan import NEW_TEXT, OLD_TEXT, Step, model_name, steps_of
from portllm.study.definition.settings import Study
from portllm.study.definition.variants import AGAIN, BASE, EVOLVED, PATCHED, PORTED, RETRAINED, VARIANTS
from portllm.study.results.rows import Checked, ModelRow, Outcome, Spectra, StudyResults, TaskRow, TaskScore

Found = Mapping[Step, Mapping[str, Any]]

ADDED = "add"
"""The method that others are compared with."""

MOST_ANSWERS = 32
"""Answers of a task that are counted; where more occur, they are texts and not labels."""


def tabulate(study: Study, found: Found) -> StudyResults:
    """The table that follows from what the steps found.

    Args:
        study: The study.
        found: What the steps found that are done, as their kinds return it.
    """
    return StudyResults(
        title=study.title,
        base=study.base,
        seeds=study.seeds,
        n_steps=len(steps_of(study)),
        n_done=len(found),
        models=tuple(_models(study, found)),
        tasks=tuple(_tasks(study, found)),
        dtype=study.dtype,
        compare=study.compare,
    )


def _models(study: Study, found: Found) -> Iterator[ModelRow]:
    by_name = {step.name: result for step, result in found.items()}

    def losses(model: str, text: str) -> tuple[float, float] | None:
        before, after = (by_name.get(Step("read", name, text=text).name) for name in (BASE, model))
        return None if before is None or after is None else (before["nats"], after["nats"])

    for name, evolution in study.evolutions.items():
        for link in range(1, evolution.links + 1):
            model = model_name(name, link)
            drift = by_name.get(Step("drift", model).name, {})
            yield ModelRow(
                evolution=name,
                link=link,
                kind=evolution.kind,
                drift=drift.get("relative"),
                cosine=drift.get("cosine"),
                old_loss=losses(model, OLD_TEXT),
                new_loss=losses(model, f"{NEW_TEXT}{name}"),
            )


def _tasks(study: Study, found: Found) -> Iterator[TaskRow]:
    by_name = {step.name: result for step, result in found.items() if step.kind == "score"}

    def scores(
        model: str, task: str, patch: str | None, seeds: Sequence[int | None] = study.seeds
    ) -> dict[int, Mapping[str, Any]]:
        """By seed; a model without a patch counts as one seed, which is nobody's."""
        seeds = [None] if patch is None else seeds
        steps = {seed: Step("score", model, task=task, seed=seed, patch=patch).name for seed in seeds}
        return {-1 if seed is None else seed: by_name[name] for seed, name in steps.items() if name in by_name}

    for name, evolution in study.evolutions.items():
        for task in study.tasks:
            for method in study.methods:
                for link in range(1, evolution.links + 1):
                    model = model_name(name, link)
                    columns = {
                        BASE: scores(BASE, task, None),
                        PATCHED: scores(BASE, task, PATCHED),
                        EVOLVED: scores(model, task, None),
                        PORTED: scores(model, task, method),
                        ADDED: {} if method == ADDED else scores(model, task, ADDED),
                        RETRAINED: scores(model, task, RETRAINED),
                        AGAIN: scores(model, task, RETRAINED, study.retrain_seeds),
                    }
                    theory = _theory(study, found, model, task)
                    measured = _measured(study, found, model, task, method)
                    yield _row(name, link, task, method, columns, theory, _checked(study, found, model, task), measured)


def _theory(study: Study, found: Found, model: str, task: str) -> list[Mapping[str, Any]]:
    """The port residual of each seed of which it was measured."""
    names = {Step("theory", model, task=task, seed=seed).name for seed in study.seeds}
    return [result["residual"] for step, result in found.items() if step.name in names]


def _residual(by_seed: Sequence[Mapping[str, Any]], yardstick: str) -> float | None:
    """Mean over seeds of the residual's Frobenius norm against a yardstick; None where none was measured."""
    ratios = [residual["total"][yardstick]["frobenius"] for residual in by_seed]
    return fmean(ratios) if ratios and None not in ratios else None


def _spectra(by_seed: Sequence[Mapping[str, Any]]) -> Spectra | None:
    modules = [module for residual in by_seed for module in residual["modules"].values()]
    if not modules:
        return None
    kinds = ("ported", "retrained", "residual")
    return Spectra(*(mean_squares([module[kind]["singular_values"] for module in modules]) for kind in kinds))


def mean_squares(spectra: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The root of the mean square, value by value; one that has fewer values has zeros.

    Example:
        >>> mean_squares([[5.0, 1.0], [1.0]])
        (3.605551275463989, 0.7071067811865476)
    """
    columns = zip_longest(*spectra, fillvalue=0.0)
    return tuple(math.sqrt(fmean(value**2 for value in column)) for column in columns)


def _checked(study: Study, found: Found, model: str, task: str) -> Checked | None:
    names = {Step("check", model, task=task, seed=seed).name for seed in study.seeds}
    by_seed = [result for step, result in found.items() if step.name in names]
    if not by_seed:
        return None
    return Checked(
        tuple(result["verdict"] for result in by_seed),
        *(_shared_means([result[part] for result in by_seed]) for part in ("weights", "text")),
    )


def _measured(study: Study, found: Found, model: str, task: str, method: str) -> dict[str, float]:
    """What a method said of itself, or was measured of a rival, by the seeds of which it ported a patch."""
    by_name = {step.name: result for step, result in found.items()}
    compared = {seed: by_name.get(Step("compare", model, task=task, seed=seed).name, {}) for seed in study.seeds}
    by_seed = [
        {**by_name[name], **compared[seed].get(method, {})}
        for seed in study.seeds
        if (name := Step("port", model, task=task, seed=seed, patch=method).name) in by_name
    ]
    return dict(sorted(_shared_means(by_seed).items())) if by_seed else {}


def _shared_means(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure that all have."""
    names = [name for name in measures[0] if all(name in each for each in measures)]
    return {name: fmean(each[name] for each in measures) for name in names}


def _row(
    evolution: str,
    link: int,
    task: str,
    method: str,
    columns: Mapping[str, Mapping[int, Mapping[str, Any]]],
    theory: Sequence[Mapping[str, Any]],
    checked: Checked | None,
    measured: Mapping[str, float],
) -> TaskRow:
    patched, ported, retrained = (columns[variant] for variant in (PATCHED, PORTED, RETRAINED))
    seeds = tuple(seed for seed in patched if seed in ported and seed in retrained)
    evolved = columns[EVOLVED]
    scored = [each for by_seed in columns.values() for each in by_seed.values()]
    compared = bool(seeds) and bool(evolved)
    added, again = columns[ADDED], list(columns[AGAIN].values())
    gain = change = behind = over_add = luck = in_accuracy = in_loss = lost = agreement = None
    if compared:
        of = {PATCHED: patched, PORTED: ported, RETRAINED: retrained}
        right = {name: mean_rows([by_seed[seed]["correct"] for seed in seeds]) for name, by_seed in of.items()}
        nats = {name: mean_rows([by_seed[seed]["losses"] for seed in seeds]) for name, by_seed in of.items()}
        gain = paired_change(right[RETRAINED], evolved[-1]["correct"])
        change, behind = (paired_change(right[PORTED], right[other]) for other in (PATCHED, RETRAINED))
        if all(seed in added for seed in seeds):
            over_add = paired_change(right[PORTED], mean_rows([added[seed]["correct"] for seed in seeds]))
        luck = paired_change(mean_rows([one["correct"] for one in again]), right[RETRAINED]) if again else None
        in_accuracy = retention(evolved=evolved[-1]["correct"], ported=right[PORTED], retrained=right[RETRAINED])
        in_loss = retention(
            evolved=evolved[-1]["losses"], ported=nats[PORTED], retrained=nats[RETRAINED], lower_is_better=True
        )
        said = [list(map(eq, *(by_seed[seed]["answers"] for by_seed in (patched, ported)))) for seed in seeds]
        agreement = accuracy(said[0]) if len(said) == 1 else mean_loss(mean_rows(said))
        lost = fmean(len(flips(patched[seed]["correct"], ported[seed]["correct"]).negative) for seed in seeds)
    return TaskRow(
        evolution=evolution,
        link=link,
        task=task,
        method=method,
        seeds=seeds,
        scored={
            name: _scored(list(columns[name].values()), texts=are_texts(scored))
            for name in (*VARIANTS, AGAIN)
            if columns[name]
        },
        commonest=commonest_right(scored),
        gain=gain,
        outcome=None if gain is None or behind is None else outcome_of(gain, behind),
        change=change,
        behind=behind,
        over_add=over_add,
        luck=luck,
        accuracy_retention=in_accuracy,
        loss_retention=in_loss,
        negative_flips=lost,
        residual_of_delta=_residual(theory, "of_delta"),
        residual_of_update=_residual(theory, "of_update"),
        spectra=_spectra(theory),
        checked=checked,
        agreement=agreement,
        measured=measured,
    )


def outcome_of(gain: Estimate, behind: Estimate) -> Outcome:
    """What came of a port, by the intervals of retraining's gain and of the difference to retraining.

    Example:
        >>> gain = Estimate(value=0.3, low=0.2, high=0.4, n_rows=100)
        >>> outcome_of(gain, Estimate(value=-0.1, low=-0.15, high=-0.05, n_rows=100))
        'behind'
        >>> outcome_of(gain, Estimate(value=-0.01, low=-0.04, high=0.02, n_rows=100))
        'level'
    """
    if gain.low is None or gain.low <= 0:
        return "nothing learned"
    if behind.high is not None and behind.high < 0:
        return "behind"
    return "ahead" if behind.low is not None and behind.low > 0 else "level"


def commonest_right(scored: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of rows whose right answer is the commonest one, as far as models that were scored give them away.

    Example:
        >>> commonest_right([{"answers": ["yes", "yes", "no"], "correct": [True, False, True]}])
        0.6666666666666666
    """
    rows = [list(zip(each["answers"], each["correct"], strict=True)) for each in scored]
    given = {answer for row in rows for answer, _ in row}
    if not rows or are_texts(scored):
        return None
    right: list[str] = []
    for answers in zip(*rows, strict=True):
        found = {answer for answer, correct in answers if correct}
        found = found or (given - {answer for answer, _ in answers} if len(given) == 2 else set())
        if len(found) != 1:
            return None
        right += found
    return max(Counter(right).values()) / len(right)


def are_texts(scored: Sequence[Mapping[str, Any]]) -> bool:
    """Whether models answered with texts, so many of which are different, and not with labels.

    Example:
        >>> are_texts([{"answers": ["yes", "no"]}]), are_texts([{"answers": [f"text {n}" for n in range(40)]}])
        (False, True)
    """
    return len({answer for each in scored for answer in each["answers"]}) > MOST_ANSWERS


def _scored(by_seed: Sequence[Mapping[str, Any]], *, texts: bool) -> TaskScore:
    columns = [scores["correct"] for scores in by_seed]
    shares = tuple(map(fmean, columns))
    return TaskScore(
        accuracy=accuracy(columns[0]) if len(columns) == 1 else mean_loss(mean_rows(columns)),
        loss=mean_loss(mean_rows([scores["losses"] for scores in by_seed])),
        by_seed=shares,
        spread=stdev(shares) if len(shares) > 1 else None,
        answers={} if texts else _shares([scores["answers"] for scores in by_seed]),
        words=fmean(mean_words(scores["answers"]) for scores in by_seed) if texts else None,
    )


def _shares(by_seed: Sequence[Sequence[str]]) -> Mapping[str, float]:
    counts = Counter(answer for answers in by_seed for answer in answers)
    falling = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {answer: count / counts.total() for answer, count in falling}


def mean_rows(columns: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several columns, row by row.

    Example:
        >>> mean_rows([[True, False], [True, True]])
        [1.0, 0.5]
    """
    return [fmean(values) for values in zip(*columns, strict=True)]
