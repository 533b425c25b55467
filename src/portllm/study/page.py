"""A study's results as a page of Markdown. Pure."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from portllm.comparison.metrics import Estimate, Retention
from portllm.study.paper import published
from portllm.study.plan import BASE, PATCHED, RETRAINED
from portllm.study.table import EVOLVED, PORTED, VARIANTS, ModelRow, Results, Scored, TaskRow

HEADS = {
    BASE: "base",
    PATCHED: "base + patch",
    EVOLVED: "evolved",
    PORTED: "evolved + ported",
    RETRAINED: "evolved + retrained",
}
COMPARED = ("ported - retrained", "retention, accuracy", "retention, loss", "negative flips")
LEGEND = """\
Accuracy in percent, mean over seeds; ± is the standard deviation over seeds, brackets hold the 95 % interval over rows:
of differences and retention by a bootstrap that draws the same rows for all models. Retention is the share of
retraining's gain over the evolved model that the ported patch has; it is no number where that gain is not told apart
from nothing. A negative flip is a row that base + patch answers right and evolved + ported answers wrong."""

RESIDUAL = """\
Frobenius norm of retrained minus ported delta, over all modules: against the retrained delta, and against the updated
weights with the patch in them, which is the paper's yardstick."""


def render_page(results: Results) -> str:
    """The page: models, tasks, chains, and what others have published."""
    lines = [f"# {results.title}", "", f"Base: {results.base}. Seeds: {', '.join(map(str, results.seeds))}.", ""]
    if results.n_done < results.n_steps:
        lines += [f"Not finished: {results.n_done} of {results.n_steps} steps are done.", ""]
    lines += ["## Updates", "", *_models(results.models), "", "## Tasks", "", LEGEND, "", *_tasks(results.tasks)]
    residuals = list(_residuals(results.tasks))
    if residuals:
        lines += ["", "## Port residual", "", RESIDUAL, "", *residuals]
    chains = list(_chains(results.tasks))
    if chains:
        lines += [
            "",
            "## Chains",
            "",
            "Retention after each update; the first patch is ported every time.",
            "",
            *chains,
        ]
    if results.compare is not None:
        lines += ["", "## Published numbers", "", *_published(results.compare)]
    return "\n".join(lines) + "\n"


def _models(rows: Sequence[ModelRow]) -> Iterator[str]:
    yield from _head("update", "kind", "drift", "cosine", "old text, nats", "new text, nats")
    for row in rows:
        yield _line(
            f"{row.evolution} {row.link}",
            row.kind,
            "" if row.drift is None else f"{100 * row.drift:.3f} %",
            "" if row.cosine is None else f"{row.cosine:.8f}",
            _before_after(row.old_loss),
            _before_after(row.new_loss),
        )


def _tasks(rows: Sequence[TaskRow]) -> Iterator[str]:
    """A table for each task."""
    for task, of_task in groupby(sorted(rows, key=lambda row: row.task), key=lambda row: row.task):
        yield from (f"### {task}", "")
        yield from _head("update", *(HEADS[name] for name in VARIANTS), *COMPARED)
        for row in of_task:
            yield _line(
                _update(row),
                *(_accuracy(row.scored.get(name)) for name in VARIANTS),
                _points(row.behind),
                _retention(row.accuracy_retention),
                _retention(row.loss_retention),
                "" if row.negative_flips is None else f"{row.negative_flips:g}",
            )
        yield ""
        yield from _losses(row for row in rows if row.task == task)
        yield ""


def _losses(rows: Iterator[TaskRow]) -> Iterator[str]:
    yield from _head("loss, nats a token", *(HEADS[name] for name in VARIANTS))
    for row in rows:
        losses = [row.scored[name].loss if name in row.scored else None for name in VARIANTS]
        yield _line(_update(row), *("" if loss is None else f"{loss.value:.4f}" for loss in losses))


def _residuals(rows: Sequence[TaskRow]) -> Iterator[str]:
    measured = [row for row in rows if row.residual_of_delta is not None]
    if measured:
        yield from _head("update", "task", "of the delta", "of the updated weights")
    for row in measured:
        of_update = "" if row.residual_of_update is None else f"{row.residual_of_update:.2e}"
        yield _line(f"{row.evolution} {row.link}", row.task, f"{row.residual_of_delta:.3f}", of_update)


def _chains(rows: Sequence[TaskRow]) -> Iterator[str]:
    longest = max((row.link for row in rows), default=1)
    if longest == 1:
        return
    yield from _head("evolution", "task", "score", *(f"{link}" for link in range(1, longest + 1)))
    for (evolution, task, method), chain in groupby(rows, key=lambda row: (row.evolution, row.task, row.method)):
        links = list(chain)
        if len(links) > 1:
            empty = [""] * (longest - len(links))
            for score in ("accuracy", "loss"):
                kept = [row.accuracy_retention if score == "accuracy" else row.loss_retention for row in links]
                yield _line(evolution, f"{task}, {method}", score, *map(_retention, kept), *empty)


def _published(name: str) -> Iterator[str]:
    table = published()[name]
    yield from (f"{table.title}; {table.provenance}", "")
    yield from _head("task", *(HEADS[variant] for variant in VARIANTS))
    for row in table.rows:
        cells = (row.pretrained, row.tuned, row.evolved, row.ported, row.retrained)
        yield _line(row.task, *("" if cell is None else f"{cell:.2f}" for cell in cells))


def _update(row: TaskRow) -> str:
    return f"{row.evolution} {row.link}, {row.method}"


def _accuracy(scored: Scored | None) -> str:
    if scored is None:
        return ""
    spread = "" if scored.spread is None else f" ± {100 * scored.spread:.1f}"
    return f"{100 * scored.accuracy.value:.1f}{spread} {_interval(scored.accuracy, digits=1)}"


def _points(change: Estimate | None) -> str:
    return "" if change is None else f"{100 * change.value:+.1f} {_interval(change, digits=1)}"


def _interval(estimate: Estimate, *, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def _retention(value: Retention | None) -> str:
    if value is None:
        return ""
    if value.value is None or value.low is None or value.high is None:
        return "no number"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _before_after(losses: tuple[float, float] | None) -> str:
    return "" if losses is None else f"{losses[0]:.4f} to {losses[1]:.4f}"


def _head(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
