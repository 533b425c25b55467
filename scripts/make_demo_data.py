"""Make the demo's data files from the full sets: `python scripts/make_demo_data.py FOLDER`.

FOLDER holds `medquad` (`train.jsonl` and `validation.jsonl` with the fields question, answer, qtype, focus, source) and
`gsm8k` (`train.jsonl` with question, answer). What is written is a function of these files alone.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).parents[1] / "src" / "portllm" / "demo" / "data"

TYPES = (
    "causes",
    "exams and tests",
    "frequency",
    "genetic changes",
    "information",
    "inheritance",
    "susceptibility",
    "symptoms",
    "treatment",
)
TRAINING_ROWS_PER_TYPE = 45
HELD_OUT_ROWS_PER_TYPE = 34
EVOLUTION_ROWS = 120
WORDS = range(10, 37)
SEED = 0

REPEATED_QUESTION = re.compile(r"^(?:[A-Z][^.?!]{0,160}\?\s*)+")
SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
FOOTNOTE_MARK = re.compile(r"(?<=[a-z]\.)\d+(?=\s|$)")
BOILERPLATE = re.compile(r"human phenotype ontology|these resources|key points|click here|http|- ", re.IGNORECASE)


def passage(answer: str) -> str | None:
    """The first sentences of an answer, without the question it may begin with; None where they are no passage."""
    text = FOOTNOTE_MARK.sub("", REPEATED_QUESTION.sub("", " ".join(answer.split())))
    kept: list[str] = []
    n_words = 0
    for sentence in SENTENCE_BREAK.split(text):
        n_words += len(sentence.split())
        if n_words >= WORDS.stop:
            break
        kept.append(sentence)
        if n_words >= 2 * WORDS.start:
            break
    found = " ".join(kept)
    fits = len(found.split()) in WORDS and found.endswith(".") and (found[:1].isupper() or found[:1].isdigit())
    return (
        found if fits and not found.startswith(("Yes.", "No.", "Summary")) and not BOILERPLATE.search(found) else None
    )


def read_rows(file: Path) -> Iterator[dict[str, str]]:
    """The objects of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def clinic_rows(file: Path, *, per_type: int, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """Passages with the type of question they answer, at most so many of each type, in a seeded order."""
    taken = set(without)
    rows: list[dict[str, str]] = []
    for source in read_rows(file):
        text = passage(source["answer"])
        if text and text not in taken and source["qtype"] in TYPES:
            taken.add(text)
            rows.append(
                {"passage": text, "type": source["qtype"], "topic": source["focus"], "source": source["source"]}
            )
    random.Random(SEED).shuffle(rows)
    chosen = [row for kind in TYPES for row in [row for row in rows if row["type"] == kind][:per_type]]
    random.Random(SEED).shuffle(chosen)
    return chosen


def write(name: str, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (OUT / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{name}: {len(rows)} rows, {len(text.encode()):,} bytes")


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    OUT.mkdir(parents=True, exist_ok=True)
    training = clinic_rows(folder / "medquad" / "train.jsonl", per_type=TRAINING_ROWS_PER_TYPE)
    seen = frozenset(row["passage"] for row in training)
    held_out = clinic_rows(folder / "medquad" / "validation.jsonl", per_type=HELD_OUT_ROWS_PER_TYPE, without=seen)
    mathematics = list(read_rows(folder / "gsm8k" / "train.jsonl"))
    random.Random(SEED).shuffle(mathematics)
    write("clinic-train.jsonl", training)
    write("clinic-heldout.jsonl", held_out)
    write("mathematics.jsonl", mathematics[:EVOLUTION_ROWS])


if __name__ == "__main__":
    main()
