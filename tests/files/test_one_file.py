"""A page is written whole or not at all, and replaces nothing that is not meant."""

import os

import pytest

from portllm.errors import OutputError, OutputExistsError
from portllm.files.one_file import check_page_free, write_page
from tests.safetensors_files import contents


def test_a_page_is_written_as_it_is_into_a_folder_that_is_made_for_it(tmp_path):
    write_page(tmp_path / "new" / "page.html", "é\n", overwrite=False)
    assert contents(tmp_path) == {"new/page.html": "é\n".encode()}


def test_what_is_there_is_kept_unless_it_is_meant(tmp_path):
    file = tmp_path / "page.html"
    file.write_text("<!DOCTYPE html>old")
    with pytest.raises(OutputExistsError, match=r"page\.html': already exists.*--overwrite"):
        write_page(file, "new", overwrite=False)
    assert file.read_text() == "<!DOCTYPE html>old"
    write_page(file, "new", overwrite=True)
    assert contents(tmp_path) == {"page.html": b"new"}


def test_what_is_no_page_is_kept_even_if_it_is_meant(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for name in ("rows.jsonl", "pipe"):
        with pytest.raises(OutputExistsError, match="is not an HTML page"):
            write_page(tmp_path / name, "new", overwrite=True)
    assert contents(tmp_path) == {"rows.jsonl": b"{}"}


def test_a_folder_is_no_place_for_a_page_even_if_it_is_meant(tmp_path):
    with pytest.raises(OutputExistsError, match="is a folder"):
        check_page_free(tmp_path, overwrite=True)


def test_a_link_that_leads_nowhere_is_something(tmp_path):
    (tmp_path / "page.html").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputExistsError):
        check_page_free(tmp_path / "page.html", overwrite=False)


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(tmp_path / "file" / "page.html", "new", overwrite=False)
    assert contents(tmp_path) == {"file": b"x"}


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    file.write_text("<!DOCTYPE html>old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_page(file, "new", overwrite=True)
    assert contents(tmp_path) == {"page.html": b"<!DOCTYPE html>old"}
