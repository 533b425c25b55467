"""The rows of the page: what is compared, its target, and its value from the results of a contest. Pure."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One number and its target.

    Attributes:
        title: For the page.
        contest: Whose results it is taken from.
        of: The job, or the numerator of a ratio.
        by: The denominator, or what is taken off; None where the job's own number counts.
        quantity: A field of `Run`, or a fact about the output.
        how: ratio, difference, number, or same: 1 where both facts are equal.
        must: The limit; None for a number that is only recorded.
        aim: What we want to reach.
        larger_is_better: The limits are lower ones.
        per: A fact about the output of `of` that the value is divided by.
        beyond: By job, another one whose number is taken off its own in each turn: what it needs whatever it does.
    """

    title: str
    contest: str
    of: str
    by: str | None
    quantity: str
    how: Literal["ratio", "difference", "number", "same"]
    must: float | None
    aim: float | None
    larger_is_better: bool = False
    per: str | None = None
    beyond: Mapping[str, str] = field(default_factory=dict)

    def is_measured(self, contests: Mapping[str, Result]) -> bool:
        """Whether there is a result of each job that it is made of."""
        jobs = {self.of, *self.beyond.values(), *([self.by] if self.by else [])}
        return self.contest in contests and jobs <= contests[self.contest]["jobs"].keys()

    def meets(self, value: float, limit: float | None) -> bool:
        """Whether a value is within a limit."""
        return limit is not None and (value >= limit if self.larger_is_better else value <= limit)


@dataclass(frozen=True)
class Value:
    """A measured number with the range of the runs.

    Attributes:
        median: Of the runs; of a ratio, the ratio of the medians.
        low: Of the turns, the smallest.
        high: Of the turns, the largest.
    """

    median: float
    low: float
    high: float


SECONDS, PRIVATE = "seconds", "private_bytes"
MB = 1e6

TOLERANCE = 0.02
"""A change below this is none: memory hardly varies between runs, and grows by a little with every module."""


def _time(
    title: str, contest: str, of: str, by: str, must: float, aim: float, *, beyond: Mapping[str, str] | None = None
) -> Row:
    """Ours takes so many times as long as another."""
    return Row(f"{title}: time", contest, of, by, SECONDS, "ratio", must, aim, beyond=beyond or {})


def _gain(title: str, contest: str, of: str, by: str, quantity: str, must: float, aim: float) -> Row:
    """Another takes so many times as much as ours."""
    return Row(title, contest, of, by, quantity, "ratio", must, aim, larger_is_better=True)


def _limit(title: str, contest: str, of: str, quantity: str, must: float, aim: float) -> Row:
    """Ours takes no more than so much."""
    return Row(title, contest, of, None, quantity, "number", must, aim)


ROWS = (
    _time("merge / cp -r and fsync, warm", "copy", "merge", "cp", 1.5, 1.1),
    _time("merge / cp -r and fsync, cold", "copy-cold", "merge", "cp", 1.5, 1.1),
    _limit("merge: private memory", "copy", "merge", PRIVATE, 700 * MB, 400 * MB),
    _gain("PEFT / merge: time", "merge", "peft", "merge", SECONDS, 3, 5),
    _gain("PEFT / merge: private memory", "merge", "peft", "merge", PRIVATE, 5, 20),
    Row(
        "merge and PEFT write the same tensors", "merge", "merge", "peft", "digest", "same", 1, 1, larger_is_better=True
    ),
    _gain("mergekit-extract-lora / capture: time", "capture", "extract", "capture", SECONDS, 20, 40),
    Row("capture / mergekit-extract-lora: residual", "capture", "capture", "extract", "residual", "ratio", 1.01, 1.01),
    _time(
        "full drift report, beyond its imports / cat of both, warm",
        "drift", "check", "cat", 2, 1.2, beyond={"check": "imports"},
    ),
    _time("full drift report / cat of both, cold", "drift-cold", "check", "cat", 2, 1.2),
    Row("check from samples, beyond its imports: time", "check", "check", "imports", SECONDS, "difference", 2, 0.5),
    _time("100 patches checked / one, full", "check-100", "check-many", "check-1", 2, 1.2),
    Row(
        "99 more patches checked from samples: time",
        "check-100-sampled", "check-many", "check-1", SECONDS, "difference", 1, 0.3,
    ),
    Row(
        "fleet of 200, beyond its first patch, one Ray worker / two: time",
        "fleet", "fleet-1", "fleet-2", SECONDS, "ratio", 1.7, 1.9, larger_is_better=True,
        beyond={"fleet-1": "fleet-first", "fleet-2": "fleet-first"},
    ),
    _limit("port: time", "port", "port", SECONDS, 1, 0.4),
    _limit("port: private memory", "port", "port", PRIVATE, 150 * MB, 80 * MB),
)  # fmt: skip


def evaluate(row: Row, result: Result) -> Value:
    """A row's value. In a turn in which only one job ran, the other's median stands in."""
    of, by = result["jobs"][row.of], result["jobs"][row.by] if row.by else None
    if row.how == "same":
        same = float(of["facts"][row.quantity] == (by or of)["facts"][row.quantity])
        return Value(same, same, same)
    ours = _numbers(result, row.of, row)
    theirs = _numbers(result, row.by, row) if row.by else []
    turns = [
        _combine(row, _at(ours, turn), _at(theirs, turn) if theirs else 0.0)
        for turn in range(max(len(ours), len(theirs)))
    ]
    middle = _combine(row, statistics.median(ours), statistics.median(theirs) if theirs else 0.0)
    unit = 1.0 if row.per is None else float(of["facts"][row.per])
    return Value(middle / unit, min(turns) / unit, max(turns) / unit)


def is_worse(row: Row, before: Value, now: Value) -> bool:
    """Whether a row fell behind by more than the noise of both measurements: their ranges lie apart."""
    if row.larger_is_better:
        return now.high * (1 + TOLERANCE) < before.low
    return now.low > before.high * (1 + TOLERANCE)


def show(row: Row, number: float) -> str:
    """A value of a row with its unit."""
    if row.how == "same":
        return "yes" if number else "no"
    if row.how == "ratio" or (row.per is not None and row.per.endswith("_bytes")):
        return f"{number:.3g} x" if number < 100 else f"{number:.0f} x"
    if row.per is not None:
        return f"{1 / number:.3g} {row.per} a second"
    return f"{number / MB:.0f} MB" if row.quantity.endswith("_bytes") else f"{number:.2f} s"


def _numbers(result: Result, name: str, row: Row) -> list[float]:
    job = result["jobs"][name]
    if row.quantity in job["facts"]:
        return [float(job["facts"][row.quantity])]
    own = [float(run[row.quantity]) for run in job["runs"]]
    less = (
        [float(run[row.quantity]) for run in result["jobs"][row.beyond[name]]["runs"]] if name in row.beyond else [0.0]
    )
    return [number - _at(less, turn) for turn, number in enumerate(own)]


def _at(numbers: Sequence[float], turn: int) -> float:
    return numbers[turn] if turn < len(numbers) else statistics.median(numbers)


def _combine(row: Row, of: float, by: float) -> float:
    match row.how:
        case "ratio":
            return of / by if min(of, by) > 0 else math.nan  # what is beyond drowned in noise: no limit is met
        case "difference":
            return of - by
        case _:
            return of
