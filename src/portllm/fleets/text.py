"""What became of a fleet, as one table or as JSON."""

from collections import Counter
from collections.abc import Mapping, Sequence

from portllm.files.record import encode
from portllm.fleets.fleet import FleetPlan
from portllm.fleets.plan import FleetRow
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import percent
from portllm.show.printable import one_line
from portllm.show.table import columns, n_bytes

TRACEBACK = "Traceback (most recent call last):"


def render_fleet(
    plan: FleetPlan, rows: Sequence[FleetRow], headline: Headline, *, dry: bool, width: int | None = None
) -> str:
    """What `fleet` prints: the sentence to act on, a line for each cell, the reasons below, then the counts."""
    sizes = {cell.folder: cell.patch.n_bytes for cell in plan.cells}
    head = ("evolved", "patch", "size", "status", "", "seconds")
    table = [head, *((*_names(row), n_bytes(sizes[row.folder]), *_outcome(row, dry=dry)) for row in rows)]
    lines = [*columns(table, width=width), *(line for row in rows for line in _reasons(row))]
    counts = Counter(_status(row, dry=dry) for row in rows)
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n".join(
        [
            *headline_lines(headline),
            "",
            *lines,
            f"{len(rows)} cells: {told}; {'would write' if dry else 'in'} {plan.work.output}",
        ]
    )


def fleet_to_json(plan: FleetPlan, rows: Sequence[FleetRow], *, dry: bool) -> dict[str, object]:
    """What `fleet --json` prints."""
    cells = []
    for cell, row in zip(plan.cells, rows, strict=True):
        names = {"patch": cell.patch.place, "evolved": cell.evolved.said, "patch_bytes": cell.patch.n_bytes}
        cells.append({**names, **encode(row), "status": _status(row, dry=dry)})
    return {"output": plan.work.output, "dry_run": dry, "cells": cells}


def _names(row: FleetRow) -> tuple[str, str]:
    evolved, _, patch = row.folder.partition("/")
    return one_line(evolved), one_line(patch)


def _outcome(row: FleetRow, *, dry: bool) -> tuple[str, str, str]:
    return _status(row, dry=dry), ", ".join(_facts(row.facts)), "" if dry or row.kept else f"{row.seconds:.1f}"


def _status(row: FleetRow, *, dry: bool) -> str:
    if row.kept:
        return "done before"
    return "would be done" if dry and row.status == "done" else row.status


def _facts(facts: Mapping[str, Mapping[str, object]]) -> list[str]:
    port, merge = facts.get("port", {}), facts.get("merge", {})
    told = [str(facts["check"]["verdict"])] if "check" in facts else []
    if isinstance(drift := port.get("sampled_drift"), float):
        told.append(f"drift {percent(drift, digits=2)}")
    if isinstance(size := merge.get("bytes"), int):
        told.append(f"merged {n_bytes(size)}")
    if isinstance(kept := merge.get("kept_gain"), float):
        told.append(f"kept gain {percent(kept)}")
    return told


def _reasons(row: FleetRow) -> list[str]:
    """The first reason of each row, and how many more there are; of a traceback it is the last line that says most."""
    told = (row.reason or "").splitlines()
    first = told[-1:] if told[:1] == [TRACEBACK] else told[:1]
    more = len(told) - len(first)
    counted = f" (and {more} more lines; --json has them all)" if more else ""
    lines = [f"{line}{counted}" for line in first] + [f"retried: {reason}" for reason in row.attempts]
    return [one_line(f"{row.folder}: {line}") for line in lines]
