import json
from pathlib import Path

import pytest

from portllm.errors import DataError
from portllm.evaluating.harness.local_rows import hub_row, local_source
from tests.evaluating.harness.conftest import write_rows

ROW = {"sentence": "Tea.", "label": 1}
GLUE = {"training_split": "train", "validation_split": "validation"}
GSM = {"training_split": "train", "fewshot_split": "train", "test_split": "test"}


def files_of(source):
    return {split: json.loads(Path(file).read_text()) for split, file in source["dataset_kwargs"]["data_files"].items()}


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", [{"split": split}])
    return folder


def test_each_split_of_the_hub_is_a_file(rows, tmp_path):
    source = local_source(GLUE, rows, tmp_path)
    assert source["dataset_path"] == "json"
    assert files_of(source) == {"train": {"split": "train"}, "validation": {"split": "validation"}}


def test_validation_rows_stand_for_a_test_split_unless_there_are_test_rows(rows, tmp_path):
    assert files_of(local_source(GSM, rows, tmp_path))["test"] == {"split": "validation"}
    write_rows(rows / "test.jsonl", [{"split": "test"}])
    assert files_of(local_source(GSM, rows, tmp_path))["test"] == {"split": "test"}


def test_without_rows_to_train_on_the_task_has_no_such_splits(rows, tmp_path):
    (rows / "train.jsonl").unlink()
    source = local_source(GSM, rows, tmp_path)
    assert source["training_split"] is source["fewshot_split"] is None
    assert list(files_of(source)) == ["test"]


@pytest.mark.parametrize(("answer", "label"), [(True, 1), (False, 0)])
def test_an_answer_that_is_true_or_false_is_a_label(answer, label):
    assert hub_row({"question": "q", "answer": answer}) == {"question": "q", "label": label}


@pytest.mark.parametrize("row", [ROW, {"sentence": "_", "answer": "2"}, {"question": "q", "answer": "#### 2"}])
def test_other_rows_stay_as_they_are(row):
    assert hub_row(row) == row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"label": 1}\n{"label":\n', "validation.jsonl', line 2: is not valid JSON"),
        (b"[1]\n", "validation.jsonl', line 1: is not a JSON object"),
        (b"\n\n", "validation.jsonl': has no rows"),
        (b"\xff\n", "validation.jsonl', line 1: is not valid JSON"),
        (rb'{"a": "\ud800"}', "line 1: is not valid JSON: it contains an unpaired surrogate"),
    ],
)
def test_lines_that_are_no_rows_are_named(rows, tmp_path, content, message):
    (rows / "validation.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        local_source(GLUE, rows, tmp_path)


def test_a_folder_that_is_not_there_is_named_with_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"validation.jsonl': cannot be read.*Expected one folder per task"):
        local_source(GLUE, tmp_path / "none", tmp_path)
