"""A square of counts, a row for what was and a column for what is now: the diagonal agrees, all else does not. Pure."""

from collections.abc import Mapping, Sequence

from portllm.show.html.markup import Html, element

SHADES = 5
"""Strengths of a color: no cell has one of its own in the style."""

LABELS = 12
"""Labels up to which a square can be read."""

Counts = Mapping[tuple[str, str], int]
"""How often a row's label meets a column's; none counts as 0."""


def matrix(labels: Sequence[str], counts: Counts, *, label: str, corner: str, before: Counts | None = None) -> Html:
    """The square as a table whose cells are shaded by their share of the row.

    Args:
        labels: Of rows and columns, in their order.
        counts: What is counted.
        label: What it is, for whoever cannot see it.
        corner: What rows and columns are, such as `right / answered`.
        before: What was counted earlier; the difference stands beside each count.
    """
    head = element("tr", element("th", corner, scope="col"), *(element("th", name, scope="col") for name in labels))
    rows = [
        element(
            "tr",
            element("th", row, scope="row"),
            *(_cell(row, column, labels, counts, before) for column in labels),
        )
        for row in labels
    ]
    inner = element("table", element("thead", head), element("tbody", *rows), class_="matrix")
    return element("div", inner, class_="scroll", role="region", tabindex="0", aria_label=label)


def _cell(row: str, column: str, labels: Sequence[str], counts: Counts, before: Counts | None) -> Html:
    count, total = counts.get((row, column), 0), sum(counts.get((row, other), 0) for other in labels)
    side = "same" if row == column else "other"
    shade = -(-SHADES * count // total) if count else 0
    moved = 0 if before is None else count - before.get((row, column), 0)
    parts: list[str] = [f"{count:,}" if count or moved else "·"]
    if moved:
        parts.append(element("small", f" {moved:+,}"))
    return element("td", *parts, class_=f"{side} d{shade}")
