"""Holds what certificates claim against what is true, on the answers of a study's real models.

    python scripts/certificate_coverage.py studies/smollm2-cpu.toml -o smollm2-cpu.study

Of each ported patch that a study has scored, the rows are the whole population: what the port lost on all of them is
known. Inputs are drawn from them again and again, as `portllm certify` asks for, with replacement; each draw gives a
bound, and the share of bounds that hold is counted. A third of the rows is kept aside besides, and a bound from the
others is held against the score on these, whose own chance it does not cover. Writes
`studies/results/certificates.json` and `.md`, a function of the study's results and the seed alone.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portllm.certifying.bounds import CONFIDENCE, upper_bound
from portllm.study.definition.file import read_study
from portllm.study.definition.variants import PATCHED
from portllm.study.run import default_folder, study_identities
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.places import Places

RESULTS = Path(__file__).parents[1] / "studies" / "results"
DRAWS = 200
INPUTS = 100
KEPT_ASIDE = 3
"""One row in so many."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A ported patch, and what became of the claims about it.

    Attributes:
        cell: Model, task, seed and method.
        rows: The population.
        answered_otherwise: Share of it that the ported model answers otherwise than base + patch.
        lost: Score of base + patch less that of the ported model, over all rows.
        holds: Share of draws whose bound is not below what was lost.
        holds_for_answers: Share of draws whose bound is not below the share that is answered otherwise: what the theory
            says of it is that it is at least the confidence, up to the chance of `DRAWS` draws.
        mean_bound: Of the draws.
        kept_aside: Share of draws from two rows in three whose bound is not below what was lost on the third.
    """

    cell: str
    rows: int
    answered_otherwise: float
    lost: float
    holds: float
    holds_for_answers: float
    mean_bound: float
    kept_aside: float


def measure(old: Mapping[str, Any], new: Mapping[str, Any], name: str, seed: int) -> Cell:
    """Draw from the rows of one ported patch."""
    other = np.array([a != b for a, b in zip(old["answers"], new["answers"], strict=True)])
    loss = np.array(old["correct"], float) - np.array(new["correct"], float)
    generator = np.random.default_rng([seed, *name.encode()])
    n = len(other)
    bounds = _bounds(other, np.arange(n), generator)
    aside, rest = np.split(generator.permutation(n), [n // KEPT_ASIDE])
    return Cell(
        name,
        n,
        float(other.mean()),
        float(loss.mean()),
        float(np.mean(bounds >= loss.mean())),
        float(np.mean(bounds >= other.mean())),
        float(bounds.mean()),
        float(np.mean(_bounds(other, rest, generator) >= loss[aside].mean())),
    )


def _bounds(other: np.ndarray, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    drawn = generator.choice(rows, (DRAWS, INPUTS))
    return np.array([upper_bound(int(k), INPUTS) for k in other[drawn].sum(axis=1)])


def read_cells(file: Path, out: Path, seed: int) -> Iterator[Cell]:
    """The ported patches of a study that are scored, in the order of its steps."""
    study = read_study(file)
    results = Ledger(study, Places(out), study_identities(out), any_version=True).results()
    patched = {(step.task, step.seed): found for step, found in results.items() if step.patch == PATCHED}
    for step, found in results.items():
        if step.kind == "score" and step.patch in study.methods and (step.task, step.seed) in patched:
            name = f"{step.model}, {step.task}, seed {step.seed}, {step.patch}"
            yield measure(patched[step.task, step.seed], found, name, seed)


def render(titles: str, cells: list[Cell]) -> str:
    """The page."""
    claims, covers = (
        100 * sum(getattr(cell, part) for cell in cells) / len(cells) for part in ("holds", "holds_for_answers")
    )
    nominal = f"{100 * CONFIDENCE:.0f} %"
    lines = [
        "# Certificates, held against what is true",
        "",
        f"Written by `scripts/certificate_coverage.py`. Studies: {titles}. The rows that a ported patch was",
        f"scored on are its population; {DRAWS} times {INPUTS} inputs are drawn from them with replacement. In",
        f"{nominal} of the draws the bound must not be below the share that is answered otherwise. What it claims,",
        "that no more of the score was lost, holds more often, since not every answer that differs is a loss. Last,",
        "the inputs are drawn from two rows in three, and the bound is held against the score on the third.",
        "",
        f"Over all {len(cells)} ported patches, {claims:.2f} % of the claims hold, and {covers:.2f} % of the bounds",
        "cover the share that is answered otherwise.",
        "",
        "| ported patch | rows | answered otherwise | lost | mean bound | claim holds | covers | on rows kept aside |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cell in cells:
        shares = (cell.answered_otherwise, cell.lost, cell.mean_bound, cell.holds, cell.holds_for_answers)
        shown = " | ".join(f"{100 * share:.1f} %" for share in (*shares, cell.kept_aside))
        lines.append(f"| {cell.cell} | {cell.rows} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the study, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="+", help="files of studies that were run")
    parser.add_argument("--output", "-o", type=Path, nargs="+", help="the folders of their results")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args()
    folders = options.output or [default_folder(file) for file in options.study]
    studies = list(zip(options.study, folders, strict=True))
    cells = [cell for file, out in studies for cell in read_cells(file, out, options.seed)]
    if not cells:
        raise SystemExit("none of the studies has scored a ported patch")
    RESULTS.mkdir(exist_ok=True)
    values = {"draws": DRAWS, "inputs": INPUTS, "confidence": CONFIDENCE, "cells": [asdict(cell) for cell in cells]}
    (RESULTS / "certificates.json").write_text(json.dumps(values, indent=1) + "\n")
    (RESULTS / "certificates.md").write_text(render(", ".join(read_study(file).title for file, _ in studies), cells))
    print((RESULTS / "certificates.md").read_text())


if __name__ == "__main__":
    main()
