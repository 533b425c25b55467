"""What became of each label, and which labels are taken for which. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelChange:
    """The rows whose right answer is one label.

    Attributes:
        label: The right answer.
        n_rows: How many rows.
        before: Of these, how many base + patch answers right.
        after: How many the port does.
        turned_wrong: How many were right and are wrong.
        turned_right: How many were wrong and are right.
    """

    label: str
    n_rows: int
    before: int
    after: int
    turned_wrong: int
    turned_right: int

    @property
    def change(self) -> float:
        """The change of the share that is right."""
        return (self.after - self.before) / self.n_rows


def by_label(right: Sequence[str], before: Sequence[str], after: Sequence[str]) -> list[LabelChange]:
    """A line for each label that is the right answer of a row, the one that lost the largest share first.

    Args:
        right: The right answer of each row.
        before: What base + patch answers.
        after: What the port answers.

    Example:
        >>> [(found.label, found.change) for found in by_label(["a", "a", "b"], ["a", "a", "b"], ["a", "b", "b"])]
        [('a', -0.5), ('b', 0.0)]
    """
    found: dict[str, Counter[tuple[bool, bool]]] = {}
    for label, was, now in zip(right, before, after, strict=True):
        found.setdefault(label, Counter())[was == label, now == label] += 1
    changes = [
        LabelChange(
            label,
            n_rows=counts.total(),
            before=counts[True, True] + counts[True, False],
            after=counts[True, True] + counts[False, True],
            turned_wrong=counts[True, False],
            turned_right=counts[False, True],
        )
        for label, counts in found.items()
    ]
    return sorted(changes, key=lambda one: (one.change, -one.n_rows, one.label))


def confusion(right: Sequence[str], answers: Sequence[str]) -> Mapping[tuple[str, str], int]:
    """How often each label is answered where each is right.

    Example:
        >>> confusion(["a", "a", "b"], ["a", "b", "b"])["a", "b"]
        1
    """
    return Counter(zip(right, answers, strict=True))
