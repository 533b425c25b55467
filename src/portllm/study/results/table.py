"""The study's results: scores of each model on each task, and retention. Pure.

Rows are paired: row `i` is the same row for every model and seed. A model's column is the mean over seeds, row by row.
Intervals are over rows, those of differences and ratios by a bootstrap that draws the same rows for all models; seeds
show as a spread of their own.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from operator import eq
from statistics import fmean, stdev
from typing import Any, Literal

from portllm.evaluating.metrics import Estimate, Retention, accuracy, flips, mean_loss, paired_change, retention
from portllm.notebook import ShownInNotebook
from portllm.study.definition.plan import NEW_TEXT, OLD_TEXT, Step, model_name, steps_of
from portllm.study.definition.settings import Study
from portllm.study.definition.variants import AGAIN, BASE, EVOLVED, PATCHED, PORTED, RETRAINED, VARIANTS

Found = Mapping[Step, Mapping[str, Any]]

Outcome = Literal["ahead", "level", "behind", "nothing learned"]
"""What came of a port, in accuracy against retraining: told apart by the 95 % interval over rows, or not."""

ADDED = "add"
"""The method that others are compared with."""

MOST_ANSWERS = 32
"""Answers of a task that are counted; where more occur, they are texts and not labels."""


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What one of the five models scored on a task.

    Attributes:
        accuracy: Share of right answers, mean over seeds, with its interval over rows.
        loss: Nats per token of the right completion, the same.
        by_seed: Accuracy of each seed; one value where there is no patch.
        spread: Standard deviation of these; None for one.
        answers: Share of the rows that each answer was given to, right or wrong, mean over seeds, the commonest first;
            empty where there are more than `MOST_ANSWERS`.
    """

    accuracy: Estimate
    loss: Estimate
    by_seed: tuple[float, ...]
    spread: float | None
    answers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Spectra:
    """Singular values of three deltas, falling: the root of the mean square over modules and seeds of each.

    The squares of all, times the number of modules, add up to the mean over seeds of the squared Frobenius norm.

    Attributes:
        ported: Of the ported delta.
        retrained: Of the retrained one.
        residual: Of the port residual, retrained minus ported.
    """

    ported: tuple[float, ...]
    retrained: tuple[float, ...]
    residual: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` said of the patches of a task on an evolved model.

    Attributes:
        verdicts: Of each seed's patch.
        weights: Measures of weights by name, means over seeds.
        text: The same of prompts; empty where the study gives none.
    """

    verdicts: tuple[str, ...]
    weights: Mapping[str, float]
    text: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One task on one evolved model, by one method.

    Attributes:
        evolution: By name.
        link: How many updates.
        task: By name.
        method: How the patch was ported.
        seeds: Those of which everything was scored.
        scored: The five models, as far as they have been scored, and the one retrained with other seeds.
        commonest: Accuracy of giving every row the commonest right answer; None where answers are texts, or no model
            gives the right answer to some row.
        gain: Accuracy of retrained minus evolved.
        outcome: Of the port. Where the gain is not told apart from nothing, there was nothing to keep.
        change: Accuracy of ported minus patched.
        behind: Accuracy of ported minus retrained.
        over_add: Accuracy of ported minus ported by addition; None for addition itself, and where the study lacks it.
        luck: Accuracy of retrained with other seeds minus retrained: the yardstick for `behind`.
        accuracy_retention: Share of retraining's gain in accuracy.
        loss_retention: The same for the loss.
        negative_flips: Rows that the patched base answers right and the ported patch wrong; mean over seeds.
        residual_of_delta: The port residual's norm against that of the retrained delta, mean over seeds; None where the
            study measures no theory.
        residual_of_update: The same against the updated weights with the patch in them, the paper's yardstick.
        spectra: Singular values of the deltas and of the residual; None likewise.
        checked: What `check` said before the patch was ported; None where the study does not ask.
        agreement: Share of the scored rows that the ported patch answers as base + patch does, mean over seeds.
        measured: What the port said of itself, means over seeds.
    """

    evolution: str
    link: int
    task: str
    method: str
    seeds: tuple[int, ...]
    scored: Mapping[str, TaskScore]
    commonest: float | None
    gain: Estimate | None
    outcome: Outcome | None
    change: Estimate | None
    behind: Estimate | None
    over_add: Estimate | None
    luck: Estimate | None
    accuracy_retention: Retention | None
    loss_retention: Retention | None
    negative_flips: float | None
    residual_of_delta: float | None
    residual_of_update: float | None
    spectra: Spectra | None
    checked: Checked | None
    agreement: Estimate | None
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ModelRow:
    """An evolved model.

    Attributes:
        evolution: By name.
        link: How many updates.
        kind: Of evolution: `lora`, `full`, `twin` or `reinit`.
        drift: `|W1 - W0| / |W0|` against the base.
        cosine: Of base and evolved weights.
        old_loss: Of the base and of this model on the old text, in nats per token.
        new_loss: The same on the evolution's new text.
    """

    evolution: str
    link: int
    kind: str
    drift: float | None
    cosine: float | None
    old_loss: tuple[float, float] | None
    new_loss: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class StudyResults(ShownInNotebook):
    """Results of a study so far.

    Attributes:
        title: The study's.
        base: Its base.
        seeds: Its seeds.
        n_steps: Its steps.
        n_done: Of these, those that are done.
        models: Evolved models.
        tasks: Tasks on them.
        compare: The published table to set beside, by name, or several.
    """

    title: str
    base: str
    seeds: tuple[int, ...]
    n_steps: int
    n_done: int
    models: tuple[ModelRow, ...]
    tasks: tuple[TaskRow, ...]
    compare: str | tuple[str, ...] | None

    def __repr__(self) -> str:
        return f"StudyResults({self.title!r}, {self.n_done} of {self.n_steps} steps)"

    def to_json(self) -> dict[str, object]:
        """Every number, in types that JSON has: an end of an interval that is infinite is null."""
        return {name: _finite(value) for name, value in asdict(self).items()}


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
    """What a method said of itself, by the seeds of which it ported a patch."""
    names = {Step("port", model, task=task, seed=seed, patch=method).name for seed in study.seeds}
    by_seed = [result for step, result in found.items() if step.name in names]
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
        scored={name: _scored(list(columns[name].values())) for name in (*VARIANTS, AGAIN) if columns[name]},
        commonest=commonest_right([each for by_seed in columns.values() for each in by_seed.values()]),
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
    if not rows or len(given) > MOST_ANSWERS:
        return None
    right: list[str] = []
    for answers in zip(*rows, strict=True):
        found = {answer for answer, correct in answers if correct}
        found = found or (given - {answer for answer, _ in answers} if len(given) == 2 else set())
        if len(found) != 1:
            return None
        right += found
    return max(Counter(right).values()) / len(right)


def _scored(by_seed: Sequence[Mapping[str, Any]]) -> TaskScore:
    columns = [scores["correct"] for scores in by_seed]
    shares = tuple(map(fmean, columns))
    return TaskScore(
        accuracy=accuracy(columns[0]) if len(columns) == 1 else mean_loss(mean_rows(columns)),
        loss=mean_loss(mean_rows([scores["losses"] for scores in by_seed])),
        by_seed=shares,
        spread=stdev(shares) if len(shares) > 1 else None,
        answers=_answers([scores["answers"] for scores in by_seed]),
    )


def _answers(by_seed: Sequence[Sequence[str]]) -> Mapping[str, float]:
    counts = Counter(answer for answers in by_seed for answer in answers)
    if len(counts) > MOST_ANSWERS:
        return {}
    falling = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {answer: count / counts.total() for answer, count in falling}


def mean_rows(columns: Sequence[Sequence[float]]) -> list[float]:
    """The mean of several columns, row by row.

    Example:
        >>> mean_rows([[True, False], [True, True]])
        [1.0, 0.5]
    """
    return [fmean(values) for values in zip(*columns, strict=True)]


def _finite(value: object) -> object:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value
