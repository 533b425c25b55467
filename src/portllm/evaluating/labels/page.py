"""What became of each label, on the pages of `evaluate` and `certify`. Pure."""

from collections.abc import Sequence

from portllm.evaluating.labels.counts import by_label, confusion
from portllm.evaluating.labels.tables import label_rows
from portllm.show.html.figure import folded, table
from portllm.show.html.markup import Html
from portllm.show.html.matrix import LABELS, matrix
from portllm.show.html.page import paragraph, section

CONFUSIONS = 15
"""Labels taken for others that are listed where a square of all labels is too large to be read."""


def label_section(right: Sequence[str], before: Sequence[str], after: Sequence[str], *, of: str) -> Html:
    """The table of labels.

    Args:
        right: The right answer of each row.
        before: What was answered before the update.
        after: What is answered now.
        of: Who answers now.
    """
    said = f"Correct answers of {of} and before the update; the label that lost most comes first. Change in points."
    header, *rows = label_rows(by_label(right, before, after))
    parts = [paragraph(said, quiet=True), table([header, *rows[:LABELS]], label="By label")]
    if others := rows[LABELS:]:
        parts.append(folded(f"{len(others)} more labels", table([header, *others], label="By label, the others")))
    return section("By label", *parts, level=3)


def confusion_section(
    labels: Sequence[str], right: Sequence[str], before: Sequence[str], after: Sequence[str], *, of: str
) -> list[Html]:
    """Which labels are taken for which: a square, or of many labels those that are confused most often.

    Args:
        labels: All of them, in their order.
        right: The right answer of each row.
        before: What was answered before the update.
        after: What is answered now.
        of: Who answers now.
    """
    now, then = confusion(right, after), confusion(right, before)
    if len(labels) <= LABELS:
        said = f"How often {of} gives each answer; small: the change since before the update."
        square = matrix(labels, now, label="Confusion matrix", corner="right / answered", before=then)
        return [section("Which labels are confused", paragraph(said, quiet=True), square, level=3)]
    wrong = sorted((pair for pair in now if pair[0] != pair[1]), key=lambda pair: (-now[pair], pair))
    if not wrong:
        return []
    rows = [("right", "answered", "rows now", "rows before")]
    rows += [(*pair, f"{now[pair]:,}", f"{then.get(pair, 0):,}") for pair in wrong[:CONFUSIONS]]
    said = f"The labels that {of} takes for others most often."
    listed = table(rows, label="Labels confused")
    return [section("Which labels are confused", paragraph(said, quiet=True), listed, level=3)]
