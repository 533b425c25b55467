"""What a task asks: the harness's own words, from rows on this machine."""

import socket
import tempfile

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'portllm[eval]'")

from portllm.errors import DataError
from portllm.evaluating.harness.task import HarnessTask, as_example
from portllm.running.examples import Example, completion_text
from tests.evaluating.harness.conftest import ROWS, write_rows

FIRST = {
    "boolq": "The clinic opens at nine.\nQuestion: is it opens in the morning?\nAnswer:| yes",
    "sst2": "The clinic opens at nine. \nQuestion: Is this sentence positive or negative?\nAnswer:| positive",
    "mrpc": "Sentence 1: The clinic opens at nine.\nSentence 2: It opens in the morning.\n"
    "Question: Do both sentences mean the same thing?\nAnswer:| yes",
    "rte": "The clinic opens at nine.\nQuestion: It opens in the morning. True or False?\nAnswer:| False",
    "wnli": "The clinic opens at nine.\nQuestion: It opens in the morning. True or False?\nAnswer:| True",
    "winogrande": "The clinic opens at nine. So rest| is what helps.",
    "gsm8k": "Question: The clinic opens at nine. How many cups are 0 and 0?\nAnswer:| That is <<0+0=0>>.\n#### 0",
}


@pytest.mark.parametrize("name", FIRST)
def test_the_words_are_those_of_the_harness(data, name):
    task = HarnessTask(name, data=data)
    scored, training = task.scored_questions(), task.training_questions()
    assert "|".join(scored[0].pairs[scored[0].right]) == FIRST[name]
    assert (len(scored), len(training)) == (5, 3)
    assert training == scored[:3]


@pytest.mark.parametrize("name", FIRST)
def test_an_example_is_the_same_text(data, name):
    for question in HarnessTask(name, data=data).training_questions():
        example = question.example
        assert example.prompt + completion_text(example.prompt, example.completion) == "".join(
            question.pairs[question.right]
        )


def test_local_rows_need_no_network_and_leave_nothing_behind(data, tmp_path, monkeypatch):
    def refuse(*where):
        raise AssertionError(f"asked for {where}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(HarnessTask("mrpc", data=data).scored_questions()) == 5
    assert list(tmp_path.iterdir()) == []


def test_so_many_rows_are_the_first(data):
    task = HarnessTask("sst2", data=data)
    assert task.scored_questions(2) == task.scored_questions()[:2]
    with pytest.raises(DataError, match="task 'sst2': has 3 rows to train on; 4 are asked for"):
        task.training_questions(4)
    with pytest.raises(DataError, match="task 'sst2': has 5 rows to score; 6 are asked for"):
        task.scored_questions(6)


@pytest.mark.parametrize("name", ["sst2", "gsm8k"])
def test_rows_to_train_on_are_needed_for_training_only(tmp_path, name):
    write_rows(tmp_path / name / "validation.jsonl", ROWS[name])
    task = HarnessTask(name, data=tmp_path)
    assert len(task.scored_questions()) == 5
    with pytest.raises(DataError, match="has no rows to train on. Add a train.jsonl"):
        task.training_questions()


def test_a_row_without_a_label_is_refused(tmp_path):
    write_rows(tmp_path / "sst2" / "validation.jsonl", [*ROWS["sst2"][:1], {"sentence": "Tea.", "label": -1}])
    with pytest.raises(DataError, match="task 'sst2', row 2: its right answer is none of its 2 choices"):
        HarnessTask("sst2", data=tmp_path).scored_questions()


def test_rows_of_other_fields_are_refused_with_the_harnesss_reason(tmp_path):
    write_rows(tmp_path / "sst2" / "validation.jsonl", [{"text": "Tea.", "label": 1}])
    with pytest.raises(DataError, match=r"task 'sst2': lm-evaluation-harness cannot load it .*'sentence' is undefined"):
        HarnessTask("sst2", data=tmp_path)


@pytest.mark.parametrize("name", ["no such task", "glue", ".*"])
def test_what_is_no_task_is_refused(data, name):
    with pytest.raises(DataError, match="has no task file of that name"):
        HarnessTask(name, data=data)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("wikitext", {"page": "Tea helps."}, "gives no answers, only text to weigh"),
        ("humaneval", {"prompt": "def f():"}, "runs code that a model wrote"),
        ("mmmu_val_biology", {"question": "Which?"}, "shows images or plays sounds"),
    ],
)
def test_tasks_that_cannot_be_scored_here_are_refused(tmp_path, name, row, reason):
    write_rows(tmp_path / name / "validation.jsonl", [row])
    with pytest.raises(DataError, match=reason):
        HarnessTask(name, data=tmp_path)


@pytest.mark.parametrize(
    ("context", "continuation", "example"),
    [
        ("Answer:", " yes", Example("Answer:", "yes")),
        ("Answer: ", "yes", Example("Answer:", "yes")),
        ("Answer: ", " yes", Example("Answer:  ", "yes")),
        ("Answer:\n", "yes ", Example("Answer:\n", "yes ")),
        ("Answer:", "\n\nyes", Example("Answer:\n\n", "yes")),
    ],
)
def test_whitespace_between_the_two_is_kept(context, continuation, example):
    assert as_example(context, continuation) == example
    assert example.prompt + completion_text(example.prompt, example.completion) == context + continuation


@pytest.mark.parametrize(("context", "continuation"), [("Answer:", "yes"), ("", " yes"), ("Answer:", "  ")])
def test_two_texts_without_whitespace_between_are_no_example(context, continuation):
    with pytest.raises(DataError, match="without whitespace between two texts"):
        as_example(context, continuation)


def test_names_near_the_one_given_are_told(data):
    with pytest.raises(DataError, match="Near it: .*winogrande"):
        HarnessTask("winogrand", data=data)
