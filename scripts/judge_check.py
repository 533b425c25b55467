"""Holds what `check` said of a study's patches against what became of them, as a page of Markdown.

    portllm study run studies/verdict-smollm2.toml --data DATA
    python -m scripts.judge_check studies/verdict-smollm2.toml > studies/results/verdict-smollm2-judged.md

The study has a table [check] and is none that the forecast was fitted on. The forecast is the one in the package.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from portllm.checking.forecast import ACCURACY, LOSS, TEXT, WEIGHTS, shipped
from portllm.checking.forecast_model import Forecast
from portllm.checking.verdict import Answer
from portllm.study.results.rows import StudyResults, TaskRow
from portllm.study.run import study_results
from scripts.fit_forecast import has_lost, read_cells
from scripts.forecast.held_out import Forecasts, coverage, mean_miss
from scripts.gen_docs import table

Rows = list[tuple[str, ...]]

UNDECIDED = (0.001, 0.02)
"""Drift of the updates of which it is counted how many patches get a decision."""


HEADS = (
    "update", "task", "drift", "begin alike", "verdict", "ported by", "ported - retrained", "- base + patch", "lost",
)  # fmt: skip


def told_rows(results: StudyResults) -> list[TaskRow]:
    """Each patch that was checked, as it was ported by the method that the verdict names, or else by addition."""
    by_patch: dict[tuple[str, int, str], dict[str, TaskRow]] = {}
    for row in results.tasks:
        if row.checked is not None and row.behind is not None:
            by_patch.setdefault((row.evolution, row.link, row.task), {})[row.method] = row
    return [
        rows["align"] if Answer.HOLDS_ALIGNED in added.checked.verdicts and "align" in rows else added
        for rows in by_patch.values()
        if (added := rows["add"]).checked is not None
    ]


def decided(rows: Sequence[TaskRow]) -> str:
    """Of patches on real updates, neither tiny nor large, how many get a decision, and how many of these were lost."""
    among = [row for row in rows if row.checked and UNDECIDED[0] < row.checked.weights["drift"] <= UNDECIDED[1]]
    sure = [row for row in among if row.checked and Answer.UNCERTAIN not in row.checked.verdicts]
    wrong = sum(map(has_lost, sure))
    low, high = (f"{100 * end:g}" for end in UNDECIDED)
    return (
        f"Of {len(among)} patches on updates of {low} to {high} % of drift, {len(sure)} got a decision; {wrong} of "
        "these were lost."
    )


def judged(results: StudyResults) -> str:
    """The page."""
    rows = told_rows(results)
    added = replace(results, tasks=tuple(row for row in results.tasks if row.method == "add"))
    if not rows:
        raise SystemExit(
            "no patch is checked and scored yet. The study needs a table [check]; go on: portllm study run."
        )
    lost = sum(map(has_lost, rows))
    return "\n\n".join(
        [
            f"# What `check` said: {results.title}",
            f"{len(rows)} patches on updates of {results.base}; lost: {lost}. Those lie behind the retrained patch by "
            "more than two points\nwith the whole 95 % interval of the difference, and behind the old specialist too. "
            "Points are of accuracy. *Begin alike*: the\nshare of prompts to which the patch, ported by addition, "
            "begins its answer as the old specialist did.",
            decided(rows),
            table(HEADS, [_said_and_done(row) for row in rows]),
            "Forecasts of retention by addition, from a fit that has seen none of these updates; intervals of 90 %.",
            table(
                ("retention by", "forecast from", "cells", "inside", "mean miss", "width"),
                [line for target in (LOSS, ACCURACY) for line in _forecasts(added, target)],
            ),
        ]
    )


def _said_and_done(row: TaskRow) -> tuple[str, ...]:
    checked, behind, change = row.checked, row.behind, row.change
    if checked is None or behind is None or change is None:
        raise AssertionError("asked of rows that have all of them")
    alike = checked.text.get("ported_agreement")
    return (
        f"{row.evolution} {row.link}",
        row.task,
        f"{100 * checked.weights['drift']:.3g} %",
        "" if alike is None else f"{100 * alike:.3g} %",
        ", ".join(sorted(set(checked.verdicts))),
        row.method,
        f"{100 * behind.value:+.1f} [{100 * behind.low:.1f}, {100 * behind.high:.1f}]",
        f"{100 * change.value:+.1f}",
        "yes" if has_lost(row) else "",
    )


def _forecasts(results: StudyResults, target: str) -> Rows:
    cells = [measured.cell for measured in read_cells(results, target)[0]]
    rows = []
    for source in (WEIGHTS, TEXT):
        forecaster = shipped().forecasters[target].get(source)
        if forecaster is None:
            continue
        found: Forecasts = [
            (cell, forecaster.predict(cell.measures))
            for cell in cells
            if set(forecaster.measures) <= cell.measures.keys()
        ]
        if found:
            width = sum(_width(forecast) for _, forecast in found) / len(found)
            inside, miss = f"{100 * coverage(found):.0f} %", f"{mean_miss(found):.3f}"
            rows.append((target, source, str(len(found)), inside, miss, f"{width:.2f}"))
    return rows


def _width(forecast: Forecast) -> float:
    return forecast.high - forecast.low


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's TOML file")
    parser.add_argument("--output", type=Path, help="its folder of results; without it, the study's default")
    given = parser.parse_args(arguments)
    print(judged(study_results(given.study, out=given.output)))


if __name__ == "__main__":
    main()
