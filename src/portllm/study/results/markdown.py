"""A study's results as headings, texts and tables, and those as a page of Markdown. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from portllm.evaluating.metrics import Estimate, Retention
from portllm.study.definition.paper import published
from portllm.study.definition.variants import HEADS, VARIANTS

if TYPE_CHECKING:
    from portllm.study.results.table import ModelRow, StudyResults, TaskRow, TaskScore

COMPARED = ("ported - retrained", "retention, accuracy", "retention, loss", "negative flips")
LEGEND = """\
Accuracy in percent, mean over seeds; ± is the standard deviation over seeds, brackets hold the 95 % interval over rows:
of differences and retention by a bootstrap that draws the same rows for all models. Retention is the share of
retraining's gain over the evolved model that the ported patch has; it is no number where that gain is not told apart
from nothing. A negative flip is a row that base + patch answers right and evolved + ported answers wrong. Last stands
the answer that each model gives most often: where the ported model gives one far more often than base + patch, the
update has moved the balance between answers. Right answers are lost by that though the patch may still tell the rows
apart as well, which the loss sees."""

COSTS = {
    "general_nats": "general text, evolved",
    "general_nats_added": "by addition",
    "general_nats_ported": "ported, nats per token",
}
"""What a port measures of what it costs outside of its domain."""

RESIDUAL = """\
Frobenius norm of retrained minus ported delta, over all modules: against the retrained delta, and against the updated
weights with the patch in them, which is the paper's yardstick."""

CHAINS = "Retention after each update; the first patch is ported every time."

Subject = Literal["study", "updates", "tasks", "task", "residual", "chains", "published"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts.

    Attributes:
        head: Names of the columns.
        rows: As many cells each.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A heading and what stands under it.

    Attributes:
        subject: What it is about.
        title: The heading; of a task, its name.
        level: Of the heading; 1 is that of the page.
        blocks: Texts and tables, in order.
    """

    subject: Subject
    title: str
    level: int
    blocks: tuple[str | Table, ...]


def parts_of(results: "StudyResults") -> Iterator[Part]:
    """The page in order: models, tasks, residuals, chains, and what others have published."""
    about = f"Base: {results.base}. Seeds: {', '.join(map(str, results.seeds))}."
    unfinished = not_finished(results)
    yield Part("study", results.title, 1, (about,) if unfinished is None else (about, f"{unfinished}."))
    yield Part("updates", "Updates", 2, (_models(results.models),))
    yield Part("tasks", "Tasks", 2, (LEGEND,))
    for task, rows in groupby(sorted(results.tasks, key=lambda row: row.task), key=lambda row: row.task):
        of_task = list(rows)
        compared = (_methods(of_task),) if len({row.method for row in of_task}) > 1 else ()
        yield Part("task", task, 3, (_scores(of_task), *compared, _losses(of_task), *_answers(of_task)))
    measured = [row for row in results.tasks if row.residual_of_delta is not None]
    if measured:
        yield Part("residual", "Port residual", 2, (RESIDUAL, _residuals(measured)))
    chains = chains_of(results.tasks)
    if chains:
        yield Part("chains", "Chains", 2, (CHAINS, _chains(chains)))
    if results.compare is not None:
        yield Part("published", "Published numbers", 2, tuple(_published(results.compare)))


def render_page(results: "StudyResults") -> str:
    """The page as Markdown."""
    blocks: list[str] = []
    for part in parts_of(results):
        blocks.append(f"{'#' * part.level} {part.title}")
        blocks += [block if isinstance(block, str) else "\n".join(_markdown(block)) for block in part.blocks]
    return "\n\n".join(blocks) + "\n"


def not_finished(results: "StudyResults") -> str | None:
    """How far a study is that is not finished; None where it is."""
    if results.n_done >= results.n_steps:
        return None
    return f"Not finished: {results.n_done} of {results.n_steps} steps are done"


def chains_of(rows: "Sequence[TaskRow]") -> "list[list[TaskRow]]":
    """The rows of each chain of updates that has more than one, by evolution, task and method."""
    groups = (list(chain) for _, chain in groupby(rows, key=lambda row: (row.evolution, row.task, row.method)))
    return [chain for chain in groups if len(chain) > 1]


def update_name(row: "TaskRow") -> str:
    """Evolution, number of updates and method."""
    return f"{row.evolution} {row.link}, {row.method}"


def retention_text(value: Retention | None) -> str:
    """A retention and its interval.

    Example:
        >>> retention_text(Retention(0.948, 0.89, 1.01)), retention_text(Retention(None, None, None, "why"))
        ('0.95 [0.89, 1.01]', 'no number')
    """
    if value is None:
        return ""
    if value.value is None or value.low is None or value.high is None:
        return "no number"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"


def accuracy_text(scored: "TaskScore | None") -> str:
    """An accuracy in percent, its spread over seeds and its interval over rows; empty where it was not scored."""
    if scored is None:
        return ""
    spread = "" if scored.spread is None else f" ± {100 * scored.spread:.1f}"
    return f"{100 * scored.accuracy.value:.1f}{spread} {_interval(scored.accuracy, digits=1)}"


def _models(rows: "Sequence[ModelRow]") -> Table:
    lines = (
        (
            f"{row.evolution} {row.link}",
            row.kind,
            "" if row.drift is None else f"{100 * row.drift:.3f} %",
            "" if row.cosine is None else f"{row.cosine:.8f}",
            _before_after(row.old_loss),
            _before_after(row.new_loss),
        )
        for row in rows
    )
    return Table(("update", "kind", "drift", "cosine", "old text, nats", "new text, nats"), tuple(lines))


def _scores(rows: "Sequence[TaskRow]") -> Table:
    lines = (
        (
            update_name(row),
            *(accuracy_text(row.scored.get(name)) for name in VARIANTS),
            _points(row.behind),
            retention_text(row.accuracy_retention),
            retention_text(row.loss_retention),
            "" if row.negative_flips is None else f"{row.negative_flips:g}",
        )
        for row in rows
    )
    return Table(("update", *(HEADS[name] for name in VARIANTS), *COMPARED), tuple(lines))


def _methods(rows: "Sequence[TaskRow]") -> Table:
    """What is asked of methods that stand beside each other."""
    lines = (
        (
            update_name(row),
            "" if row.agreement is None else f"{100 * row.agreement.value:.1f} {_interval(row.agreement, digits=1)}",
            *(f"{row.measured[name]:.3f}" if name in row.measured else "" for name in COSTS),
        )
        for row in rows
    )
    return Table(("update", "answers as base + patch, %", *COSTS.values()), tuple(lines))


def _losses(rows: "Sequence[TaskRow]") -> Table:
    lines = []
    for row in rows:
        losses = [row.scored[name].loss if name in row.scored else None for name in VARIANTS]
        lines.append((update_name(row), *("" if loss is None else f"{loss.value:.4f}" for loss in losses)))
    return Table(("loss, nats per token", *(HEADS[name] for name in VARIANTS)), tuple(lines))


def _answers(rows: "Sequence[TaskRow]") -> Iterator[Table]:
    """The commonest answer of each model; nothing where answers are texts."""
    lines = []
    for row in rows:
        found = [row.scored[name].answers if name in row.scored else {} for name in VARIANTS]
        lines.append((update_name(row), *(_commonest(answers) for answers in found)))
    if any(cell for _, *cells in lines for cell in cells):
        yield Table(("commonest answer", *(HEADS[name] for name in VARIANTS)), tuple(lines))


def _commonest(answers: Mapping[str, float]) -> str:
    return next((f"{answer}: {100 * share:.0f} %" for answer, share in answers.items()), "")


def _residuals(rows: "Sequence[TaskRow]") -> Table:
    lines = (
        (
            f"{row.evolution} {row.link}",
            row.task,
            f"{row.residual_of_delta:.3f}",
            "" if row.residual_of_update is None else f"{row.residual_of_update:.2e}",
        )
        for row in rows
    )
    return Table(("update", "task", "of the delta", "of the updated weights"), tuple(lines))


def _chains(chains: "Sequence[Sequence[TaskRow]]") -> Table:
    longest = max(map(len, chains))
    lines = []
    for links in chains:
        first, empty = links[0], [""] * (longest - len(links))
        for score in ("accuracy", "loss"):
            kept = [row.accuracy_retention if score == "accuracy" else row.loss_retention for row in links]
            lines.append((first.evolution, f"{first.task}, {first.method}", score, *map(retention_text, kept), *empty))
    return Table(("evolution", "task", "score", *(f"{link}" for link in range(1, longest + 1))), tuple(lines))


def _published(name: str) -> Iterator[str | Table]:
    table = published()[name]
    yield f"{table.title}; {table.provenance}"
    lines = (
        (row.task, *("" if cell is None else f"{cell:.2f}" for cell in cells))
        for row in table.rows
        for cells in [(row.pretrained, row.tuned, row.evolved, row.ported, row.retrained)]
    )
    yield Table(("task", *(HEADS[variant] for variant in VARIANTS)), tuple(lines))


def _points(change: Estimate | None) -> str:
    return "" if change is None else f"{100 * change.value:+.1f} {_interval(change, digits=1)}"


def _interval(estimate: Estimate, *, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"[{100 * estimate.low:.{digits}f}, {100 * estimate.high:.{digits}f}]"


def _before_after(losses: tuple[float, float] | None) -> str:
    return "" if losses is None else f"{losses[0]:.4f} to {losses[1]:.4f}"


def _markdown(table: Table) -> Iterator[str]:
    yield _line(table.head)
    yield _line("---" for _ in table.head)
    yield from map(_line, table.rows)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
