"""The tiny model with a tokenizer and room for whole prompts, and made-up rows of the seven tasks."""

import json

import pytest

from tests.language import make_reader

PAIRS = [
    ("The clinic opens at nine.", "It opens in the morning."),
    ("Tea helps against a cold.", "A cold is helped by tea."),
    ("She is at risk of a fever.", "The fever is inherited."),
    ("Rest takes time.", "Time is what rest takes."),
    ("He asks what causes measles.", "He knows it."),
]
LABELS = (1, 0, 0, 1, 1)

ROWS = {
    "sst2": [{"sentence": f"{first} ", "label": label} for (first, _), label in zip(PAIRS, LABELS, strict=True)],
    "boolq": [
        {"question": f"is {second.lower()[:-1]}", "passage": first, "answer": label == 1}
        for (first, second), label in zip(PAIRS, LABELS, strict=True)
    ],
    **{
        name: [
            {"sentence1": first, "sentence2": second, "label": label}
            for (first, second), label in zip(PAIRS, LABELS, strict=True)
        ]
        for name in ("mrpc", "rte", "wnli")
    },
    "winogrande": [
        {"sentence": f"{first} So _ is what helps.", "option1": "the tea", "option2": "rest", "answer": str(label + 1)}
        for (first, _), label in zip(PAIRS, LABELS, strict=True)
    ],
    "gsm8k": [
        {"question": f"{first} How many cups are {n} and {n}?", "answer": f"That is <<{n}+{n}={2 * n}>>.\n#### {2 * n}"}
        for n, (first, _) in enumerate(PAIRS)
    ],
}


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of the seven tasks; read it, do not write to it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        write_rows(folder / name / "train.jsonl", rows[:3])
        write_rows(folder / name / "validation.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """Folder of a tiny bfloat16 model with a tokenizer, for inputs of up to 600 tokens."""
    folder = make_reader(tmp_path_factory.mktemp("reader"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 600}))
    return folder
