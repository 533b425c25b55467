"""A study's rows: what they are is their identity, wherever they lie."""

import json
from dataclasses import replace

import pytest
import torch

from portllm.errors import DataError
from portllm.evaluating.scoring import Task, score
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import load_model, load_tokenizer
from portllm.study.definition.settings import HarnessTask, RowsTask
from portllm.study.schedule.tasks import open_task

KINDS = ("cause", "treatment", "symptoms")
ROWS = [{"text": f"what helps against a cold {n}?", "kind": KINDS[n % 3]} for n in range(9)]
SETTINGS = RowsTask(train="rows.jsonl", score="rows.jsonl", prompt="{text}\nKind:", completion="kind", score_rows=6)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_rows_are_scored_as_evaluate_scores_them(data, reader):
    source = open_task(SETTINGS, data)
    encoder = Encoder(load_tokenizer(reader))
    cpu = torch.device("cpu")
    model = load_model(reader, device=cpu, longest=source.longest)
    examples = tuple(Example(f"{row['text']}\nKind:", row["kind"]) for row in ROWS)
    task = Task(examples=examples[:6])
    ours = source.score(model, encoder, device=cpu, tick=lambda _: None)
    expected = score(model, encoder, task, device=cpu)
    assert (ours.answers, ours.losses) == (expected.answers, expected.losses)
    assert tuple(source.train_examples()) == examples


def test_the_identity_depends_on_rows_and_settings_and_not_on_the_place(data, tmp_path):
    known = open_task(SETTINGS, data).identity
    (tmp_path / "moved.jsonl").write_bytes((data / "rows.jsonl").read_bytes())
    assert open_task(replace(SETTINGS, train="moved.jsonl"), tmp_path).identity == known
    assert open_task(replace(SETTINGS, score_rows=7), data).identity != known
    assert open_task(replace(SETTINGS, prompt="{text} Kind:"), data).identity != known
    assert open_task(replace(SETTINGS, batch_size=2), data).identity == known


def test_missing_files_and_rows_are_refused(data):
    with pytest.raises(DataError, match="does not exist. Check --data"):
        open_task(replace(SETTINGS, train="no.jsonl"), data)
    with pytest.raises(DataError, match="has 9 rows, fewer than the 10"):
        open_task(replace(SETTINGS, train_rows=10), data)


def test_a_task_of_the_harness_comes_from_its_folder(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    rows = [{"sentence": f"a cold {n}", "label": n % 2} for n in range(5)]
    (tmp_path / "sst2").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = HarnessTask(name="sst2", train_rows=3, port_rows=2, score_rows=4)
    source = open_task(settings, tmp_path)
    assert [prompt.partition("\n")[0] for prompt in source.port_prompts()] == ["a cold 3", "a cold 4"]
    assert source.identity == open_task(replace(settings, train_rows=1, port_rows=0), tmp_path).identity
    assert source.identity["kind"] == "harness"
    assert [example.completion for example in source.train_examples()] == ["negative", "positive", "negative"]
    with pytest.raises(DataError, match="has 5 rows to score, fewer than the 6 requested"):
        open_task(HarnessTask(name="sst2", score_rows=6), tmp_path)


def test_a_prompt_to_port_on_does_not_tell_the_answer_that_is_a_part_of_it(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    row = {"sentence": "The cup did not fit, as _ was too big.", "option1": "the cup", "option2": "the box"}
    (tmp_path / "winogrande").mkdir()
    for split in ("train", "validation"):
        rows = ({**row, "answer": answer} for answer in "1212")
        (tmp_path / "winogrande" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_task(HarnessTask(name="winogrande", train_rows=2, port_rows=2), tmp_path)
    assert len({example.prompt for example in source.train_examples()}) == 2
    assert set(source.port_prompts()) == {source.train_examples()[0].prompt}
