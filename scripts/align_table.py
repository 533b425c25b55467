"""What was measured of ports that read prompts, as tables of docs/methods: from the studies' committed results."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Self

from portllm.show.numbers import percent

RESULTS = Path(__file__).parents[1] / "studies" / "results"

HEAD = (
    "task",
    "update",
    "method",
    "divergence",
    "prompts answered alike",
    "general text",
    "labels as the old specialist's",
    "accuracy",
)

Row = tuple[str, ...]
BOTH = ("add", "align")

Table = tuple[Row, list[Row]]
"""A head and its rows."""


def by_patch(study: str) -> Table:
    """Patches of tasks whose answers are labels, by each method."""
    found = _Rows.of(study)
    every: list[Row] = []
    for drift, evolution in found.order:
        for task in found.tasks:
            by_method = {method: found.cells[evolution, task, method] for method in found.methods}
            every += _patch(
                (task, f"{evolution}, {percent(drift, digits=2)}"), by_method, lambda *of: (percent(_accuracy(*of)),)
            )
    return HEAD, every


def means() -> Table:
    """Means over the tasks of the rivals' study, by method and update."""
    found = _Rows.of("align-smollm2")
    updates = [percent(drift, digits=2) for drift, _ in found.order]
    head = ("method", *(f"labels, {drift}" for drift in updates), *(f"accuracy, {drift}" for drift in updates))

    def of(evolution: str, method: str) -> list[Any]:
        return [found.cells[evolution, task, method] for task in found.tasks]

    rows = [
        (
            method,
            *(_mean(row["agreement"]["value"] for row in of(evolution, method)) for _, evolution in found.order),
            *(_mean(_accuracy(row, "ported") for row in of(evolution, method)) for _, evolution in found.order),
        )
        for method in found.methods
    ]
    any_method = found.methods[0]
    again = (_mean(_accuracy(row, "retrained") for row in of(evolution, any_method)) for _, evolution in found.order)
    rows.append(("retrained with labels", *("" for _ in found.order), *again))
    return head, rows


def two_seeds() -> Table:
    """Patches of two seeds, by addition and align."""
    found = _Rows.of("align-seeds-smollm2")
    cells = [
        (task, f"{evolution}, {percent(drift, digits=2)}", [found.cells[evolution, task, name] for name in BOTH])
        for drift, evolution in found.order
        for task in sorted(found.tasks)
    ]
    rows = [
        (
            *names,
            *(_interval(*(row["agreement"][side] for side in ("value", "low", "high"))) for row in (added, aligned)),
            f"{_beyond_addition(aligned):+.2f}",
            *(percent(_accuracy(added, model)) for model in ("patched", "ported")),
            *(percent(_accuracy(aligned, model)) for model in ("ported", "retrained")),
        )
        for *names, (added, aligned) in cells
    ]
    head = (
        "task",
        "update",
        "labels by add",
        "by align",
        "general text beyond addition",
        "accuracy before",
        "by add",
        "by align",
        "retrained",
    )
    return head, rows


def free_text(study: str) -> Table:
    """Patches of one task whose answers are written, by each method."""
    found = _Rows.of(study)
    (task,) = found.tasks
    rows: list[Row] = []
    for drift, evolution in found.order:
        by_method = {method: found.cells[evolution, task, method] for method in found.methods}
        rows += _patch((f"{evolution}, {percent(drift, digits=2)}",), by_method, _text)
    return (*HEAD[1:-2], "answers alike", "loss", "words"), rows


def by_prompts() -> Table:
    """Aligned ports by how many prompts there were, and whether they were drawn."""
    results = _results("align-prompts")
    rows: list[Row] = []
    for row in results["tasks"]:
        found, (_, _, prompts) = row["measured"], row["method"].partition("@")
        if not prompts:
            continue
        rows.append(
            (
                row["task"],
                prompts.replace("drawn-", "drawn: "),
                f"{found['prompts_fit']:.0f}",
                f"{found['divergence']:.4f}",
                f"{_beyond_addition(row):+.2f}",
                _interval(*(row["agreement"][side] for side in ("value", "low", "high"))),
                percent(_accuracy(row, "ported")),
            )
        )
    head = (
        "task",
        "prompts",
        "fitted on",
        "divergence",
        "general text beyond addition",
        "labels as the old specialist's",
        "accuracy",
    )
    return head, rows


def other_family() -> Table:
    """Patches that were taken to a model of another family."""
    rows: list[Row] = []
    for task, found in _results("other-family").items():
        tried = found["tried"]
        last = min((name for name in tried if name.startswith("from 0.9")), key=lambda name: tried[name]["divergence"])
        bare, carried, alone = (
            (_interval(*tried[name]["agreement"]), f"{tried[name]['general_nats']:.2f}")
            for name in ("no patch", found["chosen"], last)
        )
        for model, scored, beside in (
            ("old base", "base", ("", "")),
            ("old base and patch", "base + patch", ("", "")),
            ("new base", "evolved", bare),
            ("new base, patch carried", "evolved + ported", carried),
            ("new base, its last layer alone fitted", None, alone),
            ("new base, retrained with labels", "evolved + retrained", ("", "")),
        ):
            if scored is None:
                rows.append(("", model, *beside, "", ""))
                continue
            row = found["scored"][scored]
            labels = "" if scored == "base + patch" else _interval(*row["agreement"])
            accuracy = _interval(*(row["accuracy"][side] for side in ("value", "low", "high")))
            rows.append((task if scored == "base" else "", model, *beside, labels, accuracy))
    head = (
        "task",
        "model",
        "prompts answered alike",
        "general text",
        "labels as the old specialist's",
        "accuracy",
    )
    return head, rows


class _Rows(NamedTuple):
    """A study's rows.

    Attributes:
        cells: By update, task and method.
        order: Drift and name of each update, the smallest first.
        tasks: Their names.
        methods: Their names.
    """

    cells: dict[tuple[str, str, str], Any]
    order: list[tuple[float, str]]
    tasks: list[str]
    methods: list[str]

    @classmethod
    def of(cls, study: str) -> Self:
        results = _results(study)
        drifts = {model["evolution"]: model["drift"] for model in results["models"]}
        rows = results["tasks"]
        return cls(
            {(row["evolution"], row["task"], row["method"]): row for row in rows},
            sorted({(drifts[row["evolution"]], row["evolution"]) for row in rows}),
            list(dict.fromkeys(row["task"] for row in rows)),
            list(dict.fromkeys(row["method"] for row in rows)),
        )


def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _patch(names: Row, by_method: Mapping[str, Any], said: Callable[[Any, str], Row]) -> list[Row]:
    """A patch on an update, by each method, and trained again.

    Args:
        names: Of the patch and the update.
        by_method: Its row of each method.
        said: What the last columns say of a row and a model.
    """
    rows: list[Row] = []
    blank = ("",) * len(names)
    for method, row in by_method.items():
        # Addition is measured beside every other method, and a row of its own says nothing of it.
        of, end, ported = (by_method["align"], "_added", "_added") if method == "add" else (row, "", "_ported")
        found = of["measured"]
        rows.append(
            (
                *(blank if rows else names),
                method,
                f"{found[f'divergence{end}']:.3f}",
                _interval(*(found[f"agreement{end}{side}"] for side in ("", "_low", "_high"))),
                f"{found[f'general_nats{ported}']:.2f}",
                _interval(*(row["agreement"][side] for side in ("value", "low", "high"))),
                *said(row, "ported"),
            )
        )
    row = by_method["align"]
    bare = f"{row['measured']['general_nats']:.2f}"
    beside = (
        ("retrained with labels", "", "retrained"),
        ("no patch", bare, "evolved"),
        ("before the update", "", "patched"),
    )
    return [*rows, *((*blank, name, "", "", nats, "", *said(row, model)) for name, nats, model in beside)]


def _beyond_addition(row: Any) -> float:
    """What a port costs on general text, in nats per token."""
    return float(row["measured"]["general_nats_ported"] - row["measured"]["general_nats_added"])


def _accuracy(row: Any, model: str) -> float:
    return float(row["scored"][model]["accuracy"]["value"])


def _text(row: Any, model: str) -> Row:
    scored = row["scored"][model]
    return f"{float(scored['loss']['value']):.3f}", f"{scored['words']:.1f}"


def _interval(value: float, low: float, high: float) -> str:
    return f"{percent(value)} ({100 * low:.1f} to {100 * high:.1f})"


def _mean(shares: Iterable[float]) -> str:
    return percent(fmean(shares))
