import shutil

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")

from portllm.evaluating.harness.scoring import score_task
from portllm.evaluating.harness.source import HarnessRows
from portllm.evaluating.harness.task import HarnessTask
from portllm.running.encoding import Encoder
from portllm.running.model import load_model, load_tokenizer
from tests.evaluating.harness.conftest import ROWS, write_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ROWS)
def test_no_input_is_longer_than_the_source_says(data, reader, name):
    source = HarnessRows(name, data=data, max_new_tokens=7)
    tokenizer = load_tokenizer(reader)
    pairs = [pair for question in HarnessTask(name, data=data).scored_questions() for pair in question.pairs]
    longest = max(len(tokenizer(context + continuation)["input_ids"]) for context, continuation in pairs)
    assert longest <= source.longest
    assert HarnessRows(name, data=data, max_tokens=30).longest == 30


def test_it_scores_as_the_harness_does_and_counts_its_rows(data, reader):
    source = HarnessRows("rte", data=data, score_rows=4)
    task = HarnessTask("rte", data=data)
    model, encoder = load_model(reader, device=CPU), Encoder(load_tokenizer(reader))
    told = []
    found = source.score(model, encoder, device=CPU, tick=told.append)
    expected = score_task(model, encoder.tokenizer, task, task.scored_questions(4), device=CPU)
    assert (found.answers, found.losses, found.metrics) == (expected.answers, expected.losses, expected.metrics)
    assert sum(told) == source.n_rows == 4
    assert [example.completion for example in source.train_examples()] == ["False", "True", "True"]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_read_with_its_right_answer(data, name):
    source = HarnessRows(name, data=data)
    assert len(source.examples) == source.n_rows
    for example, question in zip(source.examples, HarnessTask(name, data=data).scored_questions(), strict=True):
        context, continuation = question.pairs[question.right]
        assert (example.prompt, example.completion) == (context, continuation.strip())


def test_the_identity_depends_on_rows_and_settings_and_not_on_the_place(data, tmp_path):
    known = HarnessRows("sst2", data=data).identity
    shutil.copytree(data, tmp_path / "moved")
    moved = tmp_path / "moved"
    assert HarnessRows("sst2", data=moved).identity == known
    assert HarnessRows("sst2", data=moved, batch_size=3).identity == known
    assert HarnessRows("sst2", data=moved, score_rows=4).identity != known
    assert HarnessRows("sst2", data=moved, train_rows=2).identity == known  # who is not trained on them scores alike
    assert HarnessRows("sst2", data=moved, max_tokens=9).identity != known
    write_rows(moved / "sst2" / "validation.jsonl", ROWS["sst2"][1:])
    assert HarnessRows("sst2", data=moved).identity != known
