"""Writing, opening and removing where a stranger may have put links: what they lead to stays as it is."""

import os
import subprocess
import sys

import pytest

from portllm.errors import OutputError
from portllm.files.input_file import local_file
from portllm.files.output_folder import check_apart
from portllm.files.own_files import (
    holds,
    ignores_case,
    inode_of,
    is_own_file,
    open_own,
    opened,
    remove_folder,
    require_real,
    write_text,
)
from tests.processes import in_child
from tests.safetensors_files import contents

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def home(tmp_path):
    """What is the user's, and must stay."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    return folder


@pytest.fixture
def evil(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    return folder


PLANTS = {
    "a link": lambda name, home: name.symlink_to(home / "mine"),
    "a link to nothing": lambda name, home: name.symlink_to(home / "new"),
    "a second name": lambda name, home: name.hardlink_to(home / "mine"),
    "a link to a folder": lambda name, home: name.symlink_to(home),
    "a pipe": lambda name, home: os.mkfifo(name),
    "a folder": lambda name, home: name.mkdir(),
}


@pytest.mark.parametrize("plant", ["a link", "a link to nothing", "a second name"])
def test_a_file_that_is_written_takes_the_place_of_a_link(plant, home, evil):
    PLANTS[plant](evil / "note", home)
    write_text(evil / "note", "é\n")
    assert is_own_file(evil / "note")
    assert contents(evil) == {"note": "é\n".encode()}
    assert contents(home) == {"mine": b"mine"}


@pytest.mark.parametrize("plant", PLANTS)
def test_nothing_is_written_through_what_was_planted_under_the_parts_name(plant, home, evil):
    PLANTS[plant](evil / ".note.part", home)
    with pytest.raises(OutputError, match="is a link, has a second hard link, or is not what this program writes"):
        write_text(evil / "note", "text")
    assert contents(home) == {"mine": b"mine"}
    assert os.listdir(evil) == [".note.part"]


@pytest.mark.parametrize("plant", PLANTS)
def test_only_a_regular_file_with_one_name_is_opened_to_be_changed(plant, home, evil):
    PLANTS[plant](evil / "note", home)
    assert not is_own_file(evil / "note")
    with opened(evil) as folder, pytest.raises(OutputError):
        open_own(folder, "note", os.O_WRONLY | os.O_CREAT)
    assert contents(home) == {"mine": b"mine"}


def test_what_a_dead_run_had_begun_to_write_is_written_over(evil):
    (evil / ".note.part").write_text("a longer text than the next one")
    write_text(evil / "note", "text")
    assert contents(evil) == {"note": b"text"}


def test_two_processes_that_write_one_file_leave_it_whole(evil):
    def write():
        for number in range(50):
            write_text(evil / "note", f"{os.getpid()}" * 100 + f" {number}")

    assert in_child(lambda: write() if in_child(write) == 0 else None) == 0
    assert os.listdir(evil) == ["note"]


def test_a_folder_is_removed_if_it_holds_what_this_program_puts_there(home, evil):
    folder = evil / "gone"
    folder.mkdir()
    (folder / "a").symlink_to(home / "mine")
    (folder / "b").hardlink_to(home / "mine")
    with opened(evil) as held:
        remove_folder(held, "gone", ("a", "b", "c"))
        remove_folder(held, "gone", ("a", "b", "c"))
    assert os.listdir(evil) == []
    assert contents(home) == {"mine": b"mine"}


@pytest.mark.parametrize("plant", ["a link to a folder", "a link", "a pipe", "a folder"])
def test_what_is_no_folder_of_this_program_is_not_removed(plant, home, evil):
    PLANTS[plant](evil / "gone", home)
    if plant == "a folder":
        (evil / "gone" / "mine").write_text("mine")
    with opened(evil) as held, pytest.raises(OutputError):
        remove_folder(held, "gone", ("a", "b"))
    assert os.listdir(evil) == ["gone"]
    assert contents(home) == {"mine": b"mine"}


def test_a_link_on_the_way_down_is_found_and_one_above_is_the_users_own(home, evil):
    (evil / "v2").symlink_to(home)
    (evil.parent / "alias").symlink_to(evil)
    require_real(evil.parent / "alias", "v3", "patch")
    with pytest.raises(OutputError, match="v2"):
        require_real(evil, "v2", "patch")


# ---- which folder a path leads to


def test_a_folder_is_the_same_by_all_its_names(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(tmp_path / "models")
    assert inode_of(tmp_path / "alias" / "base") == inode_of(tmp_path / "models" / "base")
    assert inode_of(tmp_path / "nothing") is None
    assert holds(tmp_path / "alias" / "base", tmp_path / "models" / "base")
    assert holds(tmp_path / "alias", tmp_path / "models" / "base" / "new")
    assert holds(tmp_path / "alias" / "new", tmp_path / "models" / "new" / "inner")
    assert not holds(tmp_path / "alias" / "new", tmp_path / "models" / "newer")
    assert not holds(tmp_path / "models" / "base", tmp_path / "models")


def test_letters_are_the_same_where_the_file_system_takes_them_for_the_same(tmp_path):
    (tmp_path / "Plain").mkdir()
    (tmp_path / "Out").mkdir()
    (tmp_path / "oUT").symlink_to("Out")  # as a file system that ignores case shows it
    assert ignores_case(tmp_path / "Out" / "new")
    assert not ignores_case(tmp_path / "Plain")
    assert holds(tmp_path / "Out" / "A", tmp_path / "Out" / "a")
    assert not holds(tmp_path / "Plain" / "A", tmp_path / "Plain" / "a")


BIND = """
import os, subprocess, sys
from pathlib import Path
from portllm.files.input_file import local_file
from portllm.files.output_folder import check_apart
from portllm.errors import OutputError
models, alias = map(Path, sys.argv[1:])
if subprocess.run(["mount", "--bind", models, alias], capture_output=True).returncode:
    sys.exit(2)
try:
    check_apart(alias / "base", [local_file(models / "base" / "model.safetensors")])
except OutputError:
    sys.exit(0)
sys.exit(1)
"""


def test_an_output_on_top_of_an_input_is_found_through_a_bind_mount(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "model.safetensors").touch()
    (tmp_path / "alias").mkdir()
    how = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    asked = [*how, sys.executable, "-c", BIND, str(tmp_path / "models"), str(tmp_path / "alias")]
    try:
        status = subprocess.run(asked, capture_output=True).returncode
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if status not in (0, 1):
        pytest.skip("no mount may be made here")
    assert status == 0


def test_an_output_on_top_of_an_input_is_found_through_a_link_above_it(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    file = tmp_path / "models" / "base" / "model.safetensors"
    file.touch()
    (tmp_path / "alias").symlink_to("models")
    for out in (tmp_path / "alias", tmp_path / "alias" / "base", tmp_path / "x" / ".." / "alias" / "base"):
        with pytest.raises(OutputError, match="which is an input"):
            check_apart(out, [local_file(file)])
    check_apart(tmp_path / "alias" / "other", [local_file(file)])
