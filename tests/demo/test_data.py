import json
from collections import Counter
from importlib import resources, util
from pathlib import Path

import pytest

from portllm.demo.settings import COMPLETION, EVOLUTION_TEMPLATE, PROMPT
from portllm.running.examples import ExampleFormat, read_examples, read_texts

DATA = resources.files("portllm.demo") / "data"
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_demo_data.py"


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def script():
    spec = util.spec_from_file_location("make_demo_data", SCRIPT)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_files_together_are_small():
    assert sum(len(file.read_bytes()) for file in DATA.iterdir()) < 300_000


def test_training_rows_are_balanced_over_nine_types():
    counts = Counter(row["type"] for row in rows("clinic-train.jsonl"))
    assert len(counts) == 9
    assert set(counts.values()) == {45}


def test_held_out_rows_are_of_the_same_types_and_of_other_topics_and_passages():
    training, held_out = rows("clinic-train.jsonl"), rows("clinic-heldout.jsonl")
    assert {row["type"] for row in training} == {row["type"] for row in held_out}
    assert max(Counter(row["type"] for row in held_out).values()) < len(held_out) / 5
    for field in ("topic", "passage"):
        assert not {row[field] for row in training} & {row[field] for row in held_out}, field


def test_every_row_fits_the_demos_templates():
    fmt = ExampleFormat(prompt=PROMPT, completion=COMPLETION)
    with resources.as_file(DATA) as folder:
        assert len(read_examples(folder / "clinic-train.jsonl", fmt)) == 405
        assert len(read_examples(folder / "clinic-heldout.jsonl", fmt)) == 212
        assert len(read_texts(folder / "mathematics.jsonl", EVOLUTION_TEMPLATE)) == 120


def test_the_attribution_names_every_file_and_both_licenses():
    text = (DATA / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for file in DATA.iterdir():
        assert file.name == "ATTRIBUTION.md" or f"`{file.name}`" in text
    for words in ("CC BY 4.0", "Ben Abacha", "Changes:", "MIT License", "Copyright (c) 2021 OpenAI"):
        assert words in text


@pytest.mark.parametrize(
    ("answer", "passage"),
    [
        (
            "What causes X? X is caused by a\nrare change in one gene of the body. It is also known. " + "Long. " * 40,
            "X is caused by a rare change in one gene of the body. It is also known. Long. Long. Long.",
        ),
        ("Too short.", None),
        ("Yes. " + "Every one of these words counts for the passage that follows.", None),
        ("See http://example.org for more of what the clinic has to say about this.", None),
        ("One sentence that never comes to an end " * 9, None),
        (
            "It affects one in 4,000 babies and most of them are boys.1 More.",
            "It affects one in 4,000 babies and most of them are boys. More.",
        ),
    ],
)
def test_a_passage_is_the_first_sentences_of_an_answer(script, answer, passage):
    assert script.passage(answer) == passage


def test_the_files_are_a_function_of_their_sources(script, tmp_path, monkeypatch):
    for name, count in (("train", 8), ("validation", 3)):
        folder = tmp_path / "medquad"
        folder.mkdir(exist_ok=True)
        source = [
            {
                "question": "?",
                "answer": f"Number {index} of {name} tells of the {kind} of a disease in more than ten words.",
                "qtype": kind,
                "focus": f"{name} {index}",
                "source": "NIH",
            }
            for index in range(count)
            for kind in ("causes", "symptoms", "no such type")
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    written = []
    for out in (tmp_path / "one", tmp_path / "two"):
        monkeypatch.setattr(script, "OUT", out)
        monkeypatch.setattr("sys.argv", ["make_demo_data.py", str(tmp_path)])
        script.main()
        written.append({file.name: file.read_text() for file in out.iterdir()})
    assert written[0] == written[1]
    kinds = Counter(json.loads(line)["type"] for line in written[0]["clinic-train.jsonl"].splitlines())
    assert kinds == {"causes": 8, "symptoms": 8}
    assert written[0]["mathematics.jsonl"] == '{"question": "1 + 1?", "answer": "2"}\n'
