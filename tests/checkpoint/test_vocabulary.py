"""Which row stands for which token."""

import json

import pytest

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.vocabulary import parse_vocabulary, read_vocabulary
from portllm.errors import CheckpointError


def checkpoint_at(folder):
    return Checkpoint("model", folder, {}, {}, {})


def test_a_model_without_a_tokenizer_has_no_vocabulary(tmp_path):
    assert read_vocabulary(checkpoint_at(tmp_path)) is None


def test_a_single_file_has_no_vocabulary():
    assert read_vocabulary(checkpoint_at(None)) is None


def test_the_tokens_of_a_tokenizer_are_read(tmp_path):
    content = {"model": {"vocab": {"é": 3}}, "added_tokens": [{"id": 5, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(checkpoint_at(tmp_path)) == {"é": 3, "<x>": 5}


def test_an_added_token_wins():
    tokenizer = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 7, "content": "a"}]}
    assert parse_vocabulary(tokenizer) == {"a": 7}


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"model": []},
        {"model": {"vocab": 3}},
        {"added_tokens": [3]},
        {"added_tokens": 3},
        {"added_tokens": {"a": 1}},
    ],
)
def test_a_tokenizer_that_lists_nothing_has_no_vocabulary(tokenizer):
    assert parse_vocabulary(tokenizer) is None


def test_a_tokenizer_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        read_vocabulary(checkpoint_at(tmp_path))


@pytest.mark.parametrize("row", [-1, 2**31, True, 1.0, "1", None, [0]])
@pytest.mark.parametrize("place", ["vocab", "added"])
def test_a_row_that_no_embedding_has_is_refused(row, place, tmp_path):
    added = {"added_tokens": [{"id": row, "content": "a"}]}
    content = {"model": {"vocab": {"a": row}}} if place == "vocab" else added
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json': token 'a' has the row .*, which is not a valid row"):
        read_vocabulary(checkpoint_at(tmp_path))


def test_a_scored_token_that_is_no_text_is_passed_over():
    assert parse_vocabulary({"model": {"vocab": [["a", -1.5], [["b"], -2.5], [], 3, ["c"]]}}) == {"a": 0, "c": 4}
