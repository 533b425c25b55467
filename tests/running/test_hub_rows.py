"""Datasets by address, read by `datasets` itself from a folder that stands for the hub."""

import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from portllm.errors import DataError, MissingExtraError, RemoteError
from portllm.running import hub_rows
from portllm.running.data import read_data
from portllm.running.hub_rows import parse_address

ROWS = [{"question": f"who {n}?", "type": "person" if n % 2 else "place", "n": n} for n in range(6)]
TEMPLATE = {"prompt": "{question} {n}", "completion": "type"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Folders below it are its datasets; `datasets` and this program keep what they read beside it."""
    import datasets

    monkeypatch.setattr(hub_rows, "SCHEME", f"{tmp_path}/hub/")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "own"))
    return tmp_path / "hub"


def jsonl(file, rows=ROWS):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_split_is_read_as_the_same_rows_in_a_file_are(hub, tmp_path):
    jsonl(hub / "org" / "one" / "test.jsonl")
    jsonl(hub / "org" / "one" / "train.jsonl", ROWS[:2])
    found = read_data("hf://datasets/org/one/test", **TEMPLATE)
    jsonl(tmp_path / "test.jsonl", [{**row, "n": str(row["n"])} for row in ROWS])
    same = read_data(tmp_path / "test.jsonl", **TEMPLATE)
    assert (found.rows, found.digest) == (same.rows, same.digest)
    assert found.given == f"{hub}/org/one/test"
    assert len(read_data("hf:/datasets/org/one/test[:2]", **TEMPLATE).rows) == 2


def test_a_choice_is_asked_for_only_where_there_is_one(hub):
    jsonl(hub / "org" / "one" / "train.jsonl")
    assert len(read_data("hf://datasets/org/one", **TEMPLATE).rows) == 6
    jsonl(hub / "org" / "two" / "train.jsonl")
    jsonl(hub / "org" / "two" / "test.jsonl", ROWS[:2])
    with pytest.raises(DataError, match="has the splits 'train', 'test'. Name one, such as .*/org/two/test"):
        read_data("hf://datasets/org/two", **TEMPLATE)
    with pytest.raises(DataError, match="has no split 'dev', but 'train', 'test'. Name one, such as"):
        read_data("hf://datasets/org/two/dev", **TEMPLATE)


def test_subsets_are_named_and_read(hub):
    for name, rows in (("easy", ROWS[:1]), ("hard", ROWS[:3])):
        jsonl(hub / "org" / "sub" / name / "test.jsonl", rows)
    parts = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("easy", "hard"))
    (hub / "org" / "sub" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    assert len(read_data("hf://datasets/org/sub/hard", **TEMPLATE).rows) == 3
    assert len(read_data("hf://datasets/org/sub/easy/train", **TEMPLATE).rows) == 1
    with pytest.raises(DataError, match="has the subsets 'easy', 'hard'. Name one, such as .*/org/sub/easy/train"):
        read_data("hf://datasets/org/sub/train", **TEMPLATE)
    with pytest.raises(DataError, match="has no subset 'odd', but 'easy', 'hard'"):
        read_data("hf://datasets/org/sub/odd/train", **TEMPLATE)


def test_messages_are_objects_and_binary_columns_are_left_out(hub):
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    (hub / "org" / "chat").mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{"messages": messages, "picture": {"bytes": b"\0", "path": "a.png"}}])
    parquet.write_table(table, hub / "org" / "chat" / "train.parquet")
    assert read_data("hf://datasets/org/chat").rows[0].answer == "me"
    with pytest.raises(DataError, match="no field 'picture'; .*the row has 'messages'"):
        read_data("hf://datasets/org/chat/train", prompt="{picture}", completion="messages")


def test_one_file_of_a_dataset_is_read(hub):
    jsonl(hub / "org" / "one" / "more" / "odd.jsonl", ROWS[:3])
    jsonl(hub / "org" / "one" / "train.jsonl")
    assert len(read_data("hf://datasets/org/one/more/odd.jsonl", **TEMPLATE).rows) == 3


def test_what_cannot_be_read_is_told_with_its_cause_on_one_line(hub):
    with pytest.raises(
        DataError, match=r"/org/none': cannot be read: \w+: .*none[^\n]*HF_HUB_OFFLINE is set: unset it"
    ):
        read_data("hf://datasets/org/none", **TEMPLATE)


@pytest.mark.parametrize("address", ["hf://org/name", "hf://datasets/name", "hf://datasets/../x", "hf://datasets/a/b@"])
def test_another_address_is_refused_with_the_form(address):
    with pytest.raises(DataError, match="is no address of a dataset. Expected: hf://datasets/OWNER/NAME/SPLIT"):
        parse_address(address)
    with pytest.raises(DataError, match="has 3 parts after the name"):
        parse_address("hf://datasets/a/b/c/d/e")


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "portllm.running.hub_rows")
    with pytest.raises(MissingExtraError, match="datasets of the Hugging Face Hub need its library; .*Run"):
        read_data("hf://datasets/org/one/test", **TEMPLATE)


def test_without_a_network_it_is_soon_said_what_to_do(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot reach .*pass a data file, or set HF_HUB_OFFLINE=1"):
        read_data("hf://datasets/org/one/test", **TEMPLATE)
