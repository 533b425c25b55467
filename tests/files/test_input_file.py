"""Files of strangers are opened without waiting, and are seen to be the same at the end as at the start."""

import os

import pytest

from portllm.checkpoint.gguf.file import open_gguf
from portllm.checkpoint.safetensors import header
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.errors import CheckpointError, DataError, FleetFileError, HeaderError, InputChangedError
from portllm.files import json_text, toml_file
from portllm.files.input_file import (
    local_file,
    open_descriptor,
    open_unchanged,
    read_input,
    require_unchanged,
    unchanged,
)
from portllm.files.json_file import MAX_CONFIG_BYTES, read_config
from portllm.files.json_text import parse_json
from portllm.files.source import LocalFile, RemoteFile
from portllm.files.toml_file import read_toml
from portllm.running import rows
from portllm.running.examples import read_texts
from tests.odd_places import device, loop


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, "a pipe or a device"),
        (device, "a pipe or a device"),
        (os.mkdir, "a folder"),
        (loop, "symbolic links"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_file_is_refused_at_once(make, problem, tmp_path):
    make(tmp_path / "odd")
    with pytest.raises(OSError, match=problem):
        open_descriptor(tmp_path / "odd")


def test_a_name_that_no_file_can_have_is_refused_as_any_other():
    with pytest.raises(OSError, match="no file can have such a name"):
        read_input("a\0b")


def test_a_file_is_read_whole_up_to_a_bound(file):
    assert read_input(file, most=7) == b"content"
    with pytest.raises(OSError, match="has 7 bytes; the limit is 6"):
        read_input(file, most=6)


def test_no_descriptor_is_left_open(file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    known = local_file(file)
    file.write_bytes(b"other")
    before = os.listdir("/proc/self/fd")
    for attempt in (
        lambda: read_input(file),
        lambda: open_descriptor(tmp_path / "pipe"),
        lambda: open_descriptor(tmp_path),
        lambda: open_unchanged(known),
    ):
        try:
            attempt()
        except (OSError, InputChangedError):
            continue
    assert os.listdir("/proc/self/fd") == before


def test_a_file_that_describes_another_is_watched_with_it(file, tmp_path):
    (tmp_path / "config").write_bytes(b"{}")
    whole = local_file(file, described_by=[local_file(tmp_path / "config")])
    require_unchanged([whole])
    (tmp_path / "config").write_bytes(b"{ }")
    with pytest.raises(InputChangedError, match="config"):
        require_unchanged([whole])


def test_what_goes_wrong_in_a_block_hides_no_change_behind_it(file):
    known = local_file(file)

    def fail():
        with unchanged([known]):
            file.unlink()
            raise KeyError("of the block")

    with pytest.raises(KeyError, match="of the block"):
        fail()


def test_files_of_the_hub_and_of_the_program_itself_are_not_watched(tmp_path):
    require_unchanged([RemoteFile("https://x/y", "y", 1, "", "x/y"), LocalFile(tmp_path / "missing")])


@pytest.mark.parametrize("text", [b"a = " + b"[" * 20_000 + b"]" * 20_000, b"a." * 20_000 + b"a = 1", b"\xff", b"a ="])
def test_toml_that_cannot_be_understood_is_told(text, file):
    file.write_bytes(text)
    with pytest.raises(FleetFileError, match="is not valid TOML"):
        read_toml(file, kind="fleet", error=FleetFileError)


def test_more_values_than_any_file_has_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(json_text, "MAX_VALUES", 3)
    assert parse_json(b"[[], 1]") == [[], 1]
    with pytest.raises(ValueError, match="more than 3 values"):
        parse_json(b"[[], 1, 2]")


def test_a_configuration_larger_than_any_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "config.json", "wb") as stream:
        stream.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"the limit is {MAX_CONFIG_BYTES}"):
        read_config(tmp_path / "config.json")


def test_a_header_larger_than_any_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "m.safetensors", "wb") as stream:
        stream.write((header.MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        stream.truncate(10**9)
    with pytest.raises(HeaderError, match="the limit is"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("tensors", "fields"), [(2**18 + 1, 0), (0, 2**16 + 1), (2**63, 2**63)])
def test_a_gguf_file_that_announces_more_than_any_has_is_refused(tensors, fields, tmp_path):
    with open(tmp_path / "m.gguf", "wb") as stream:
        stream.write(b"GGUF" + (3).to_bytes(4, "little") + tensors.to_bytes(8, "little") + fields.to_bytes(8, "little"))
        stream.truncate(10**9)
    with pytest.raises(CheckpointError, match="it announces"):
        open_gguf(tmp_path / "m.gguf")


def test_a_row_longer_than_any_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 20)
    (tmp_path / "rows.jsonl").write_text('{"q": "a"}\n' + '{"q": "' + "b" * 20 + '"}\n')
    with pytest.raises(DataError, match="line 2: has more than 20 bytes"):
        read_texts(tmp_path / "rows.jsonl", "{q}")


def test_a_toml_file_larger_than_any_is_not_read(file, monkeypatch):
    monkeypatch.setattr(toml_file, "MAX_TOML_BYTES", 3)
    with pytest.raises(FleetFileError, match="the limit is 3"):
        read_toml(file, kind="fleet", error=FleetFileError)
