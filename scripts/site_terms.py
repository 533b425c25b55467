"""The terms of docs/terms.md as abbreviations, which the site appends to each page: a term shows what it means.

    python scripts/site_terms.py > build/terms.md

Words that stand in every other sentence, such as base or patch, are left out: a page full of marks explains nothing.
"""

import re
from collections.abc import Iterator
from pathlib import Path

TERMS = Path(__file__).parents[1] / "docs" / "terms.md"

EVERYWHERE = frozenset(
    "base evolved patch adapter rank alpha scale module shard capture port merge combine plan record digest "  # noqa: SIM905
    "interval drift delta".split()
)


def abbreviations(page: str) -> Iterator[str]:
    """A line for each term in the tables of a page, and one for its plural."""
    for line in page.splitlines():
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) < 2 or cells[0] == "term" or set(cells[0]) <= {"-"} or cells[0] in EVERYWHERE:
            continue
        term, *between, meaning = cells
        said = "; ".join(filter(None, (meaning, *between))).replace("`", "")
        yield from (f"*[{form}]: {said}" for form in dict.fromkeys((term, f"{term.removesuffix('s')}s")))


if __name__ == "__main__":
    print("\n" + "\n".join(abbreviations(TERMS.read_text(encoding="utf-8"))))
