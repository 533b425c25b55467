"""Fits the forecast that `portllm check` shows, from the results of a study that has a table [check].

    portllm study run studies/forecast-smollm2.toml --data DATA
    python -m scripts.fit_forecast studies/forecast-smollm2.toml
    python -m scripts.gen_docs

The first takes its time, and goes on where it was stopped; the second writes `src/portllm/checking/forecast.json` from
what is done: coefficients, the cells that they were fitted on, and how well base pairs are forecast that were left out.
The third writes `docs/forecast.md` from that file. What is written is a function of the study's results alone.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from portllm.checking.forecast import ACCURACY, FILE, LOSS, TEXT, WEIGHTS, forecaster_to_json
from portllm.checking.forecast_model import Feature
from portllm.measures.thresholds import SHORT_DRIFT
from portllm.study.definition.variants import PORTED, RETRAINED
from portllm.study.results.rows import StudyResults, TaskRow
from portllm.study.run import study_results
from scripts.forecast.fit import Cell, fit
from scripts.forecast.held_out import Forecasts, coverage, forecast_held_out, mean_miss, rank_agreement, regret

OUT = Path(__file__).parents[1] / "src" / "portllm" / "checking" / FILE

FEATURES: Mapping[str, tuple[Feature, ...]] = {
    WEIGHTS: (
        Feature("drift", sign=-1, is_log=True),
        Feature("drift_layer", sign=-1, is_log=True),
        Feature("drift_tokens", sign=-1, is_log=True),
        Feature("drift_of_size", sign=-1, is_log=True),
        Feature("overlap_input", sign=-1, is_log=True),
    ),
    TEXT: (
        Feature("drift", sign=-1, is_log=True),
        Feature("drift_layer", sign=-1, is_log=True),
        Feature("ported_kl", sign=-1, is_log=True),
        Feature("evolved_kl", sign=1, is_log=True),
        Feature("ported_agreement", sign=1),
        Feature("shift_cosine", sign=1),
    ),
}
"""Chosen before anything was fitted; a slope cannot turn against its sign, and is 0 where a measure says nothing."""

SIMPLE: Mapping[str, tuple[Feature, ...]] = {
    "drift alone": (Feature("drift", sign=-1, is_log=True),),
    "CKA alone": (Feature("cka", sign=1),),
    "ported_kl alone": (Feature("ported_kl", sign=-1, is_log=True),),
}
"""Single measures, fitted as the forecast is: what it has to beat. The last was chosen afterwards, since it ranks
best of all that are measured."""

ENOUGH = 0.9
"""Expected retention from which a patch is ported, and below which it is trained again."""

TOLERANCE = 0.02
"""Accuracy by which a port may lie behind a retrained patch and still count as good."""

FEWEST_PAIRS = 3
"""One is left out to judge the forecast, one more for its interval, and one has to be there to fit on."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell of the study.

    Attributes:
        cell: What the forecast is fitted on.
        row: What the study says of it.
    """

    cell: Cell
    row: TaskRow


def read_cells(results: StudyResults, target: str) -> tuple[list[Measured], list[str]]:
    """The cells whose retention is a number, and of the others that are done why it is none.

    All links of a chain count as one base pair: each contains what those before it did.

    Args:
        results: Of a study that checks its patches.
        target: Retention by `loss` or by `accuracy`.
    """
    cells, left_out = [], []
    for row in results.tasks:
        kept = row.loss_retention if target == LOSS else row.accuracy_retention
        if kept is None or row.checked is None:
            continue
        patch = f"{row.task} on {row.link}"
        if kept.value is None:
            left_out.append(f"{row.evolution}, {patch}: {kept.reason}")
            continue
        measures = {**row.checked.weights, **row.checked.text}
        cells.append(Measured(Cell(row.evolution, patch, measures, kept.value), row))
    return cells, left_out


def fit_all(results: StudyResults) -> dict[str, object]:
    """What is written; of fewer than `FEWEST_PAIRS` evolutions the cells alone, since nothing can be fitted to them."""
    measured, _ = read_cells(results, LOSS)
    if not measured:
        raise SystemExit("no cell is measured and checked yet. Go on with the study: portllm study run.")
    return {
        "study": results.title,
        "base": results.base,
        "n_updates": len({(each.row.evolution, each.row.link) for each in measured}),
        "n_cells": len(measured),
        "targets": {target: _forecasts(results, target) for target in (LOSS, ACCURACY)},
        "rules": _rules(results, measured),
        "verdicts": _verdicts(measured),
        "lost_from": _lost_from(measured),
        "cells": [_cell(each) for each in measured],
    }


def _sets(cells: Sequence[Cell]) -> Mapping[str, tuple[Feature, ...]]:
    """The sets of features that all cells have, those of the forecasts first; none where nothing can be fitted."""
    if len({cell.pair for cell in cells}) < FEWEST_PAIRS:
        return {}
    return {
        name: features
        for name, features in {**FEATURES, **SIMPLE}.items()
        if all(feature.name in cell.measures for cell in cells for feature in features)
    }


def _forecasts(results: StudyResults, target: str) -> dict[str, object]:
    """What was fitted to one kind of retention, and how well left-out updates were forecast."""
    measured, left_out = read_cells(results, target)
    cells = [each.cell for each in measured]
    sets = _sets(cells)
    return {
        "cells": len(cells),
        "left_out": left_out,
        "forecasters": {name: forecaster_to_json(fit(cells, sets[name])) for name in FEATURES if name in sets},
        "held_out": {name: _judged(forecast_held_out(cells, features)) for name, features in sets.items()},
    }


def _judged(forecasts: Forecasts) -> dict[str, object]:
    """How well left-out updates were forecast."""
    pairs, said = [cell.pair for cell, _ in forecasts], [forecast.retention for _, forecast in forecasts]
    return {
        "spearman": asdict(rank_agreement(pairs, said, [cell.retention for cell, _ in forecasts])),
        "mean_miss": mean_miss(forecasts),
        "coverage": coverage(forecasts),
        "width": fmean(forecast.high - forecast.low for _, forecast in forecasts),
        "extrapolated": sum(bool(forecast.outside) for _, forecast in forecasts),
    }


def _rules(results: StudyResults, measured: Sequence[Measured]) -> dict[str, object]:
    """What each rule costs, over all cells whose retention by loss is a number."""
    cells = [each.cell for each in measured]
    ported, retrained = (
        {(each.cell.pair, each.cell.patch): each.row.scored[name].accuracy.value for each in measured}
        for name in (PORTED, RETRAINED)
    )
    ports: dict[str, Callable[[int], bool]] = {
        "copy where shapes match": lambda _: True,
        f"copy up to {100 * SHORT_DRIFT.value:g} % of drift": lambda n: cells[n].measures["drift"] <= SHORT_DRIFT.value,
        "train always": lambda _: False,
    }
    for target in (LOSS, ACCURACY):
        known = [each.cell for each in read_cells(results, target)[0]]
        for name, features in _sets(cells).items():
            said = _said_of(cells, known, features)
            ports[f"{target}, {name}"] = lambda n, said=said: said[n] >= ENOUGH  # type: ignore[misc]
    return {name: asdict(regret(cells, ported, retrained, rule, tolerance=TOLERANCE)) for name, rule in ports.items()}


def _said_of(cells: Sequence[Cell], known: Sequence[Cell], features: Sequence[Feature]) -> list[float]:
    """The forecast of each cell by a fit on the known cells of other base pairs."""
    fitted = {pair: fit([cell for cell in known if cell.pair != pair], features) for pair in {c.pair for c in cells}}
    return [fitted[cell.pair].predict(cell.measures).retention for cell in cells]


def _verdicts(measured: Sequence[Measured]) -> dict[str, object]:
    """What became of the patches that got each verdict."""
    by_verdict: dict[str, list[TaskRow]] = defaultdict(list)
    for each in measured:
        for verdict in each.row.checked.verdicts if each.row.checked else ():
            by_verdict[verdict].append(each.row)
    return {
        verdict: {
            "cells": len(rows),
            "least": min(_kept(row) for row in rows),
            "mean": fmean(_kept(row) for row in rows),
            "most": max(_kept(row) for row in rows),
            "behind": fmean(_behind(row) for row in rows),
            "farthest_behind": min(_behind(row) for row in rows),
            "lost": sum(map(has_lost, rows)),
        }
        for verdict, rows in sorted(by_verdict.items())
    }


def _lost_from(measured: Sequence[Measured]) -> float | None:
    """The least drift at which a patch has lost; None where none has."""
    return min((each.cell.measures["drift"] for each in measured if has_lost(each.row)), default=None)


def has_lost(row: TaskRow) -> bool:
    """Whether the ported patch lies behind by more than the tolerance, so far that it is no luck.

    It does where it is behind the retrained one with the whole interval of the difference in accuracy, which knows the
    luck of rows, and behind the old specialist: what sets it apart from the retrained one alone may be luck, too.
    """
    if row.behind is None or row.change is None:
        return False
    return row.behind.high < -TOLERANCE and row.change.value < -TOLERANCE


def _kept(row: TaskRow) -> float:
    return row.loss_retention.value if row.loss_retention and row.loss_retention.value is not None else float("nan")


def _behind(row: TaskRow) -> float:
    """Points of accuracy of the ported patch above the retrained one."""
    return 100 * (row.scored[PORTED].accuracy.value - row.scored[RETRAINED].accuracy.value)


def _cell(each: Measured) -> dict[str, object]:
    used = {feature.name for features in (*FEATURES.values(), *SIMPLE.values()) for feature in features}
    in_loss, in_accuracy = each.row.loss_retention, each.row.accuracy_retention
    return {
        "pair": each.cell.pair,
        "patch": each.cell.patch,
        LOSS: None if in_loss is None else [in_loss.value, in_loss.low, in_loss.high],
        ACCURACY: None if in_accuracy is None else [in_accuracy.value, in_accuracy.low, in_accuracy.high],
        "accuracies": {name: scored.accuracy.value for name, scored in each.row.scored.items()},
        "verdicts": [] if each.row.checked is None else list(each.row.checked.verdicts),
        "measures": {name: value for name, value in each.cell.measures.items() if name in used},
    }


def rounded(value: Any) -> Any:
    """Numbers with six significant digits: more would be rounding of the machine that measured."""
    match value:
        case dict():
            return {key: rounded(inner) for key, inner in value.items()}
        case list() | tuple():
            return [rounded(inner) for inner in value]
        case float():
            return float(f"{value:.6g}") if abs(value) != float("inf") else None
        case _:
            return value


def render(found: Mapping[str, Any]) -> str:
    """The text of the file: JSON with a line for each cell."""
    rest = json.dumps({name: value for name, value in found.items() if name != "cells"}, indent=1)
    cells = ",\n  ".join(map(json.dumps, found["cells"]))
    head = rest.removesuffix("\n}")
    return f'{head},\n "cells": [\n  {cells}\n ]\n}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the study's TOML file")
    parser.add_argument("--output", type=Path, help="its folder of results; without it, the study's default")
    parser.add_argument("--to", type=Path, default=OUT, help="the file to write")
    given = parser.parse_args(arguments)
    found = fit_all(study_results(given.study, out=given.output))
    given.to.write_text(render(rounded(found)), encoding="utf-8")
    print(f"{given.to}: {found['n_cells']} cells of {found['n_updates']} updates")


if __name__ == "__main__":
    main()
