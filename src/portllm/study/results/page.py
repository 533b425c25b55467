"""The page of a study: the tables of its Markdown page, and pictures of scores, retention, chains, residuals. Pure."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from portllm.evaluating.metrics import Retention
from portllm.evaluating.page import RETENTION_MARKS
from portllm.methods.table import METHODS
from portllm.show.headline import Headline
from portllm.show.html.bars import Row, bars, dots
from portllm.show.html.figure import figure, figures, table
from portllm.show.html.lines import Curve, Point, lines
from portllm.show.html.markup import Html
from portllm.show.html.page import Tile, document, fragment, paragraph, section
from portllm.show.numbers import counted, percent, points
from portllm.study.definition.variants import AGAIN, BASE, EVOLVED, HEADS, PATCHED, PORTED, RETRAINED
from portllm.study.results.markdown import (
    COMPARED,
    SCORED,
    Part,
    Table,
    accuracy_text,
    chains_of,
    not_finished,
    outcome_lines,
    outcomes_text,
    parts_of,
    retention_text,
    update_name,
)

if TYPE_CHECKING:
    from portllm.study.results.rows import Spectra, StudyResults, TaskRow

BEFORE, AFTER = (BASE, PATCHED), (EVOLVED, PORTED, RETRAINED, AGAIN)
SERIES = {PATCHED: 1, PORTED: 2, RETRAINED: 3, AGAIN: 4}
"""Colors of the models; those without a patch have that of the background, 5."""

MARKS = "Dot: in accuracy, square: in loss; the line is the 95 % interval. No mark: retention is undefined."


def study_page(results: "StudyResults") -> str:
    """The page of what a study has found so far."""
    _, *others = parts_of(results)
    sections = [section(part.title, *_pictures(part, results), *_blocks(part), level=part.level) for part in others]
    about = {
        "base": results.base,
        "seeds": ", ".join(map(str, results.seeds)),
        "scored in": SCORED[results.dtype],
        "steps": f"{results.n_done:,} of {results.n_steps:,} done",
    }
    return document(results.title, _headline(results), sections, about=about, tiles=_tiles(results))


def notebook(results: "StudyResults") -> str:
    """What a notebook shows: the tables, without the pictures."""
    parts = (section(part.title, *_blocks(part), level=part.level) for part in parts_of(results))
    return fragment(_headline(results), *parts)


def _headline(results: "StudyResults") -> Headline:
    """How far it is; else how many ports kept what retraining gains and how many did not, and the worst of them."""
    unfinished, lines = not_finished(results), _retained(_ports(results))
    if unfinished is not None:
        return Headline("doubt", unfinished, lines)
    ports = _ports(results)
    if not ports:
        return Headline("plain", lines[0] if lines else "Finished; nothing was ported", lines[1:])
    text = outcomes_text(ports)
    by_method = outcome_lines(ports) if len({row.method for row in ports}) > 1 else []
    return Headline("plain", text[0].upper() + text[1:], [*by_method, *_worst(ports), *lines])


def _ports(results: "StudyResults") -> "list[TaskRow]":
    """What is compared with retraining: by port methods, not by what stands beside them; by those, where all are."""
    compared = [row for row in results.tasks if row.outcome is not None]
    return [row for row in compared if row.method in METHODS] or compared


def _worst(rows: "Sequence[TaskRow]") -> list[str]:
    """The port that is furthest behind retraining where something is learned, in words; none where nothing is."""
    found = [(row.behind.value, update_name(row), row.task) for row in _learned(rows) if row.behind is not None]
    if not found:
        return []
    behind, update, task = min(found)
    return [f"{_against_retraining(behind)} retraining in accuracy at worst ({task}, {update})"]


def _learned(rows: "Sequence[TaskRow]") -> "list[TaskRow]":
    return [row for row in rows if row.outcome != "nothing learned"]


def _against_retraining(behind: float) -> str:
    """A difference to retraining, in words.

    Example:
        >>> _against_retraining(-0.28), _against_retraining(0.0)
        ('28.0 points behind', 'Level with')
    """
    if not round(behind, 3):
        return "Level with"
    return f"{points(abs(behind)).lstrip('+')} points {'behind' if behind < 0 else 'ahead of'}"


def _tiles(results: "StudyResults") -> list[Tile]:
    """What the ports lost against retraining, and the least that each measure kept."""
    ports = _ports(results)
    changes = [row.behind.value for row in _learned(ports) if row.behind is not None]
    if not ports:
        return []
    said = f"at worst, against retraining; at best {points(max(changes))}" if changes else ""
    tiles = [Tile("Change in accuracy", f"{points(min(changes))} points", said)] if changes else []
    for what, kept in (
        ("accuracy", [row.accuracy_retention for row in ports]),
        ("loss", [row.loss_retention for row in ports]),
    ):
        values = [one.value for one in kept if one is not None and one.value is not None]
        if values:
            tiles.append(Tile(f"Kept in {what}", percent(min(values)), f"at worst; at best {percent(max(values))}"))
    return [
        *tiles,
        Tile("Ports", f"{len(ports):,}", "compared with retraining"),
    ]


def _retained(rows: "Sequence[TaskRow]") -> list[str]:
    """What was kept by accuracy and by loss, the one that kept less first: never the kinder of two."""
    found = []
    for what, kept in (
        ("accuracy", [row.accuracy_retention for row in rows]),
        ("loss", [row.loss_retention for row in rows]),
    ):
        compared = [one for one in kept if one is not None]
        values = [one.value for one in compared if one.value is not None]
        if values:
            without = len(compared) - len(values)
            ends = f"{min(values):.2f} to {max(values):.2f} over {counted(len(values), 'port')}"
            said = f"retention in {what}: {ends}" + (f"; undefined for {without}" if without else "")
            found.append((min(values), said))
        elif compared:
            found.append((-math.inf, f"retention in {what}: undefined for all of {counted(len(compared), 'port')}"))
    return [said for _, said in sorted(found, key=lambda one: one[0])]


def _blocks(part: Part) -> Iterator[Html]:
    for block in part.blocks:
        if isinstance(block, Table):
            for number, rows in enumerate(_narrow([block.head, *block.rows])):
                yield table(rows, label=f"{part.title}: {rows[0][0]}{', compared' * number}")
        else:
            yield paragraph(block, quiet=part.level > 1)


def _narrow(rows: Sequence[Sequence[str]]) -> Iterator[Sequence[Sequence[str]]]:
    """A table as two where the scores of models and what is compared do not fit beside each other on a page."""
    cut = min((rows[0].index(name) for name in COMPARED if name in rows[0]), default=0)
    if not cut:
        yield rows
        return
    yield [row[:cut] for row in rows]
    yield [(row[0], *row[cut:]) for row in rows]


def _pictures(part: Part, results: "StudyResults") -> list[Html]:
    """What goes above the tables of a part."""
    rows = [row for row in results.tasks if part.subject != "task" or row.task == part.title]
    match part.subject:
        case "task":
            return _side_by_side("", [*_scores(part.title, rows), *_retention(part.title, rows)])
        case "chains":
            return _side_by_side(MARKS, [_chain(chain) for chain in chains_of(rows) if any(map(_is_compared, chain))])
        case "residual":
            said = "Singular values of the deltas and of the residual: root of the mean square over modules and seeds."
            return _side_by_side(said, [_spectra(row, row.spectra) for row in rows if row.spectra is not None])
        case _:
            return []


def _side_by_side(said: str, found: Sequence[Html]) -> list[Html]:
    """Pictures and what explains them all; nothing where there are none."""
    above = [paragraph(said, quiet=True)] if said else []
    return [*above, figures(*found)] if found else []


def _scores(task: str, rows: "Sequence[TaskRow]") -> list[Html]:
    """Bars of the models before the update, and of those after each."""
    drawn = _group("before any update", rows[0], BEFORE)
    for row in rows:
        drawn += _group(update_name(row), row, AFTER)
    if not drawn:
        return []
    title, explained = f"Accuracy, {task}", "Mean over seeds; the line is its 95 % interval over rows."
    picture = bars(drawn, title=title, told=_told(drawn), unit="%", held=(0.0, 1.0))
    numbers = [("update", "model", "accuracy in percent")]
    shown = [("", rows[0], BEFORE), *((update_name(row), row, AFTER) for row in rows)]
    numbers += [
        (update, HEADS[name], accuracy_text(row.scored[name]))
        for update, row, names in shown
        for name in names
        if name in row.scored
    ]
    return [figure(title, explained, picture, numbers)]


def _group(title: str, row: "TaskRow", names: Sequence[str]) -> list[Row]:
    """Those of some models that have been scored, under one heading."""
    found = [(name, row.scored[name].accuracy) for name in names if name in row.scored]
    return [
        Row(HEADS[name], one.value, percent(one.value), one.low, one.high, SERIES.get(name, 5), "" if number else title)
        for number, (name, one) in enumerate(found)
    ]


def _retention(task: str, rows: "Sequence[TaskRow]") -> list[Html]:
    drawn, numbers = [], [("update", "in accuracy", "in loss")]
    for row in rows:
        if row.accuracy_retention is not None and row.loss_retention is not None:
            drawn.append(_kept(row.accuracy_retention, "in accuracy", 1, update_name(row)))
            drawn.append(_kept(row.loss_retention, "in loss", 2, ""))
            numbers.append((update_name(row), drawn[-2].text, drawn[-1].text))
    if not drawn:
        return []
    title = f"Retention, {task}"
    explained = f"The ported patch's gain over the evolved model as a fraction of retraining's gain. {MARKS}"
    picture = dots(drawn, title=title, told=_told(drawn), axis=RETENTION_MARKS, unit="%")
    return [figure(title, explained, picture, numbers)]


def _is_compared(row: "TaskRow") -> bool:
    return row.accuracy_retention is not None or row.loss_retention is not None


def _kept(kept: Retention, name: str, series: int, group: str) -> Row:
    return Row(name, kept.value, retention_text(kept), kept.low, kept.high, series, group)


def _chain(chain: "Sequence[TaskRow]") -> Html:
    """Retention against the number of updates."""
    first = chain[0]
    both = (
        ("in accuracy", 1, [row.accuracy_retention for row in chain]),
        ("in loss", 2, [row.loss_retention for row in chain]),
    )
    curves = [
        Curve(name, [_point(row.link, one) for row, one in zip(chain, kept, strict=True)], series)
        for name, series, kept in both
    ]
    title = f"{first.task}, {first.evolution}, {first.method}"
    told = "; ".join(f"{name} {', '.join(map(retention_text, kept))}" for name, _, kept in both)
    picture = lines(
        curves, title=title, told=told, x_name="updates since the patch was made", unit="%", axis=RETENTION_MARKS
    )
    numbers = [("updates", *(name for name, _, _ in both))]
    numbers += [
        (str(row.link), retention_text(row.accuracy_retention), retention_text(row.loss_retention)) for row in chain
    ]
    return figure(title, "", picture, numbers)


def _point(link: int, kept: Retention | None) -> Point:
    return Point(link, None) if kept is None else Point(link, kept.value, kept.low, kept.high)


def _spectra(row: "TaskRow", spectra: "Spectra") -> Html:
    """Singular values of ported, retrained and residual delta."""
    found = (("ported", 2, spectra.ported), ("retrained", 3, spectra.retrained), ("residual", 1, spectra.residual))
    curves = [
        Curve(name, [Point(number, value) for number, value in enumerate(values, start=1)], series)
        for name, series, values in found
    ]
    title = f"{row.task}, {row.evolution} {row.link}"
    ends = (f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, _, values in found if values)
    picture = lines(curves, title=title, told="; ".join(ends), x_name="singular value", unit="", is_log=True)
    numbers = [("singular value", *(name for name, _, _ in found))]
    for number in range(max(len(values) for _, _, values in found)):
        cells = (f"{values[number]:.3g}" if number < len(values) else "" for _, _, values in found)
        numbers.append((str(number + 1), *cells))
    return figure(title, "", picture, numbers)


def _told(rows: Sequence[Row]) -> str:
    """In words: a heading, and what stands under it."""
    return "; ".join(f"{row.group + ': ' if row.group else ''}{row.name} {row.text}" for row in rows)
