"""Labels that may be misspelt: seen once, or nearly another that is far commoner. Pure."""

from collections.abc import Iterator, Mapping

MOST_LABELS = 20
"""Different answers up to which they are always taken for labels."""

FEWEST_ROWS = 4
"""Rows for each label from which one that is seen once is odd; with fewer, answers are texts and no labels."""

COMMONER = 3
"""How many times as often as a label another one must be seen, for the first to be taken for its misspelling."""

SHORTEST = 4
"""Letters of a label: shorter ones are near each other by chance."""


def are_texts(counts: Mapping[str, int]) -> bool:
    """Whether answers are texts rather than labels: many different ones, most of them seen once.

    Example:
        >>> are_texts({"yes": 30, "no": 30}), are_texts({f"answer {number}": 1 for number in range(30)})
        (False, True)
    """
    return len(counts) > MOST_LABELS and 2 * len(counts) > sum(counts.values())


def doubtful_labels(counts: Mapping[str, int]) -> Iterator[str]:
    """What to ask about labels.

    Args:
        counts: How often each is the right answer.

    Example:
        >>> list(doubtful_labels({"refund": 9, "refnd": 1, "account": 8}))
        ["label 'refnd' (1 row) is nearly 'refund' (9 rows). If it is misspelt, correct the rows."]
    """
    if sum(counts.values()) < FEWEST_ROWS * len(counts):
        return
    for label, count in counts.items():
        commoner = [other for other, more in counts.items() if more >= COMMONER * count and are_near(label, other)]
        if commoner:
            yield (
                f"label '{label}' ({_rows(count)}) is nearly '{commoner[0]}' ({_rows(counts[commoner[0]])}). "
                "If it is misspelt, correct the rows."
            )
        elif count == 1:
            yield f"label '{label}' is the answer of one row only. If it is a mistake, correct the row."


def are_near(one: str, other: str) -> bool:
    """Whether two labels differ by case, blanks and signs alone, or by one letter, or two that were swapped.

    Example:
        >>> are_near("refnd", "refund"), are_near("Re-fund", "refund"), are_near("label_1", "label_2")
        (True, True, False)
    """
    if _letters(one) == _letters(other):
        return one != other
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    rests = (one[start : len(one) - end], other[start : len(other) - end])
    is_small = all(len(rest) <= 1 for rest in rests) or (len(rests[0]) == 2 and rests[0] == rests[1][::-1])
    return is_small and min(len(one), len(other)) >= SHORTEST and not any(map(str.isdigit, "".join(rests)))


def _letters(label: str) -> str:
    return "".join(filter(str.isalnum, label.casefold())) or label


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
