"""What became of each label as a table. Pure."""

from collections.abc import Sequence

from portllm.evaluating.labels.counts import LabelChange
from portllm.show.numbers import percent, points


def label_rows(changes: Sequence[LabelChange]) -> list[tuple[str, ...]]:
    """A line for each label; the first row names the columns."""
    header = ("label", "rows", "before", "now", "change", "turned wrong", "turned right")
    return [
        header,
        *(
            (
                one.label,
                f"{one.n_rows:,}",
                percent(one.before / one.n_rows),
                percent(one.after / one.n_rows),
                points(one.change) if one.change else "0.0",
                f"{one.turned_wrong:,}",
                f"{one.turned_right:,}",
            )
            for one in changes
        ),
    ]
