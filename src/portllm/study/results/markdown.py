"""A study's results as headings, texts and tables, and those as a page of Markdown. Pure."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from portllm.evaluating.metrics import Estimate, Retention
from portllm.study.definition.paper import PublishedTable, published
from portllm.study.definition.variants import AGAIN, HEADS, VARIANTS

if TYPE_CHECKING:
    from portllm.study.results.rows import ModelRow, StudyResults, TaskRow, TaskScore

COMPARED = ("ported - retrained", "again - retrained", "retention, accuracy", "retention, loss", "negative flips")
LEGEND = """\
Accuracy in percent, mean over seeds; ± is the standard deviation over seeds, brackets hold the 95 % interval over rows:
of differences and retention by a bootstrap that draws the same rows for all models. Retention is the share of
retraining's gain over the evolved model that the ported patch has; it is no number where that gain is not told apart
from nothing. A negative flip is a row that base + patch answers right and evolved + ported answers wrong. Last stands
the answer that each model gives most often: where the ported model gives one far more often than base + patch, the
update has moved the balance between answers. Right answers are lost by that though the patch may still tell the rows
apart as well, which the loss sees. Of texts it is how many words they have, parted by blanks, on average."""

OVERVIEW = """\
Accuracy in percent, mean over seeds. The outcome is that of ported against retrained: ahead or behind where the 95 %
interval of the difference says so, else level. Where retraining's gain over the evolved model is not told apart from
nothing, nothing was learned that a port could keep or lose; there the gain stands in the place of the difference. Of
twenty ports that are level in truth, one is expected to be called ahead or behind. Commonest: what giving every row the
commonest right answer scores. A patch that is no better has learned no more than that; a port can keep or lose it."""

LUCK = f"""\
{HEADS[AGAIN].capitalize()}: a patch trained on the evolved model with another seed. How far it is from the retrained
one is how far luck alone goes."""

MEASURED: dict[str, tuple[str, Callable[[float], str]]] = {
    "token_agreement": ("tokens as base + patch on prompts, %", lambda share: f"{100 * share:.1f}"),
    "token_agreement_added": ("by addition, %", lambda share: f"{100 * share:.1f}"),
    "general_nats": ("general text, evolved", lambda nats: f"{nats:.3f}"),
    "general_nats_added": ("by addition", lambda nats: f"{nats:.3f}"),
    "general_nats_ported": ("ported, nats per token", lambda nats: f"{nats:.3f}"),
}
"""What a port measures: how much of written answers it keeps, and what it costs outside of its domain."""

RESIDUAL = """\
Frobenius norm of retrained minus ported delta, over all modules: against the retrained delta, and against the updated
weights with the patch in them, which is the paper's yardstick."""

PUBLISHED = "Below each row that others published stand those of this study for the same task, ported by addition."

SCORED = {"float32": "float32", "auto": "the base's own dtype, where the processor computes in it"}

CHAINS = "Retention after each update; the first patch is ported every time."

Subject = Literal["study", "overview", "updates", "tasks", "task", "residual", "chains", "published"]


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
    """The page in order: all tasks, models, each task, residuals, chains, and what others have published."""
    about = f"Base: {results.base}. Seeds: {', '.join(map(str, results.seeds))}. Scored in {SCORED[results.dtype]}."
    unfinished = not_finished(results)
    yield Part("study", results.title, 1, (about,) if unfinished is None else (about, f"{unfinished}."))
    ended = [row for row in results.tasks if row.outcome is not None]
    if ended:
        luck = (LUCK,) if AGAIN in variants_of(ended) else ()
        ends = (f"{line}." for line in outcome_lines(ended))
        yield Part("overview", "All tasks", 2, (*ends, OVERVIEW, *luck, _overview(ended)))
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
    if results.compare:
        yield Part("published", "Published numbers", 2, (PUBLISHED,))
        for name in (results.compare,) if isinstance(results.compare, str) else results.compare:
            yield _published(published()[name], results.tasks)


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


def variants_of(rows: "Sequence[TaskRow]") -> tuple[str, ...]:
    """The models that have been scored in any of the rows, or may be in all studies."""
    return (*VARIANTS, AGAIN) if any(AGAIN in row.scored for row in rows) else VARIANTS


def outcome_lines(rows: "Sequence[TaskRow]") -> list[str]:
    """How many ports came to which end, by method: wins, losses, and what is neither."""
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == method]
        said = (outcomes_text(of_method), _over_addition(of_method), _kept(of_method), _kept_in_loss(of_method))
        lines.append(f"{method}: {''.join(said)}")
    return lines


def _kept(rows: "Sequence[TaskRow]") -> str:
    """How many rows are answered as before the update, on average and at least: right and wrong answers alike."""
    found = [row.agreement.value for row in rows if row.agreement is not None]
    if not found:
        return ""
    return f"; {100 * fmean(found):.1f} % of the rows answered as by base + patch ({100 * min(found):.1f} at least)"


def _kept_in_loss(rows: "Sequence[TaskRow]") -> str:
    """How much of what retraining gains in loss is kept, on average and at least: of written answers, what counts."""
    retentions = (row.loss_retention for row in rows)
    found = [each.value for each in retentions if each is not None and each.value is not None]
    if not found:
        return ""
    mean, least = (round(value, 2) + 0.0 for value in (fmean(found), min(found)))  # no minus before a zero
    return f"; {mean:.2f} of retraining's gain in loss kept ({least:.2f} at least)"


def _over_addition(rows: "Sequence[TaskRow]") -> str:
    """By how much a method is better than addition, and how often one is told apart from the other."""
    found = [row.over_add for row in rows if row.over_add is not None]
    if not found:
        return ""
    better = sum(one.low is not None and one.low > 0 for one in found)
    worse = sum(one.high is not None and one.high < 0 for one in found)
    mean = 100 * fmean(one.value for one in found)
    return f"; against addition {mean:+.1f} points on average, better for {better} of {len(found)}, worse for {worse}"


def outcomes_text(rows: "Sequence[TaskRow]") -> str:
    """How many ports came to which end, in words."""
    count = Counter(row.outcome for row in rows)
    learned = sum(count[end] for end in ("level", "ahead", "behind"))
    if not learned:
        return f"in accuracy, retraining learns nothing that any of {len(rows)} ports could keep"
    ends = f"{count['level']} level with retraining in accuracy, {count['ahead']} ahead, {count['behind']} behind"
    compared = [row for row in rows if row.outcome == "behind" and row.luck is not None]
    if compared:
        n_beyond = sum(-row.behind.value > abs(row.luck.value) for row in compared if row.behind and row.luck)
        ends += f" ({n_beyond} by more than another seed of retraining is)"
    nothing = f"; for {len(rows) - learned} more, retraining learns nothing that could be kept"
    return f"of {learned} ports, {ends}" + nothing * (learned < len(rows))


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


def _overview(rows: "Sequence[TaskRow]") -> Table:
    """All rows with the plainest numbers."""
    variants = variants_of(rows)
    lines = (
        (
            row.task,
            "" if row.gain is None else f"{row.gain.n_rows:,}",
            "" if row.commonest is None else f"{100 * row.commonest:.1f}",
            update_name(row),
            *(f"{100 * row.scored[name].accuracy.value:.1f}" if name in row.scored else "" for name in variants),
            f"{row.outcome}, {_points(row.gain if row.outcome == 'nothing learned' else row.behind)}",
            retention_text(row.loss_retention),
        )
        for row in sorted(rows, key=lambda row: row.task)
    )
    return Table(
        ("task", "rows", "commonest", "update", *(HEADS[name] for name in variants), "outcome", "kept in loss"),
        tuple(lines),
    )


def _scores(rows: "Sequence[TaskRow]") -> Table:
    variants = variants_of(rows)
    left_out = () if AGAIN in variants else ("again - retrained",)
    lines = (
        (
            update_name(row),
            *(accuracy_text(row.scored.get(name)) for name in variants),
            _points(row.behind),
            *(() if left_out else (_points(row.luck),)),
            retention_text(row.accuracy_retention),
            retention_text(row.loss_retention),
            "" if row.negative_flips is None else f"{row.negative_flips:g}",
        )
        for row in rows
    )
    compared = (name for name in COMPARED if name not in left_out)
    return Table(("update", *(HEADS[name] for name in variants), *compared), tuple(lines))


def _methods(rows: "Sequence[TaskRow]") -> Table:
    """What is asked of methods that stand beside each other."""
    told = {name: MEASURED[name] for name in MEASURED if any(name in row.measured for row in rows)}
    lines = (
        (
            update_name(row),
            _points(row.over_add),
            "" if row.agreement is None else f"{100 * row.agreement.value:.1f} {_interval(row.agreement, digits=1)}",
            *(text(row.measured[name]) if name in row.measured else "" for name, (_, text) in told.items()),
        )
        for row in rows
    )
    heads = (head for head, _ in told.values())
    return Table(("update", "ported - by addition", "answers as base + patch, %", *heads), tuple(lines))


def _losses(rows: "Sequence[TaskRow]") -> Table:
    lines, variants = [], variants_of(rows)
    for row in rows:
        losses = [row.scored[name].loss if name in row.scored else None for name in variants]
        lines.append((update_name(row), *("" if loss is None else f"{loss.value:.4f}" for loss in losses)))
    return Table(("loss, nats per token", *(HEADS[name] for name in variants)), tuple(lines))


def _answers(rows: "Sequence[TaskRow]") -> Iterator[Table]:
    """The commonest answer of each model; where answers are texts, how long they are."""
    variants = variants_of(rows)
    for head, text in (("commonest answer", _commonest), ("words per answer", _length)):
        lines = [
            (update_name(row), *(text(row.scored[name]) if name in row.scored else "" for name in variants))
            for row in rows
        ]
        if any(cell for _, *cells in lines for cell in cells):
            yield Table((head, *(HEADS[name] for name in variants)), tuple(lines))


def _commonest(score: "TaskScore") -> str:
    return next((f"{answer}: {100 * share:.0f} %" for answer, share in score.answers.items()), "")


def _length(score: "TaskScore") -> str:
    return "" if score.words is None else f"{score.words:.1f}"


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


def _published(table: PublishedTable, ours: "Sequence[TaskRow]") -> Part:
    """What others published, each task with what the study found below it by their method."""
    lines: list[tuple[str, ...]] = []
    for row in table.rows:
        cells = (row.pretrained, row.tuned, row.evolved, row.ported, row.retrained)
        lines.append((row.task, "published", *("" if cell is None else f"{cell:.2f}" for cell in cells)))
        for own in ours:
            if (own.task, own.method) == (row.task, "add") and own.scored:
                found = (own.scored[name].accuracy.value if name in own.scored else None for name in VARIANTS)
                shown = ("" if value is None else f"{100 * value:.2f}" for value in found)
                lines.append(("", f"here: {update_name(own)}", *shown))
    head = ("task", "numbers", *(HEADS[variant] for variant in VARIANTS))
    return Part("published", table.title, 3, (table.provenance, Table(head, tuple(lines))))


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
