"""The program as a whole: the order of its commands, and what it says when it is interrupted."""

import subprocess
import sys

import pytest

from portllm.cli.main import RESUMED, after_interruption
from scripts.gen_docs import find_program, open_context


def test_the_commands_are_listed_in_the_order_in_which_a_patch_goes_through_them():
    program = find_program()
    listed = program.list_commands(open_context(program, "portllm"))
    assert " ".join(listed) == (
        "demo inspect train capture check port merge combine evaluate certify export prove verify sign fleet doctor "
        "study"
    )
    assert set(RESUMED) <= set(listed)


def test_no_line_of_the_list_of_commands_is_cut(portllm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = portllm("--help").out.partition("Commands:")[2]
    assert "doctor" in listed
    assert "..." not in listed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "p"], "at the current shard"),
        (["port", "p"], "at the current layer"),
        (["--quiet", "demo"], "last finished step"),
        (["train"], "starts over"),
        ([], "starts over"),
    ],
)
def test_what_the_same_command_does_after_an_interruption_is_said_of_that_command(arguments, said):
    assert said in after_interruption(arguments)


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["merge", "--into", "x", "-o", "y"]])
@pytest.mark.parametrize("name", ["a" * 5000, "org/" + "a" * 5000])
def test_a_name_too_long_for_any_file_is_told_in_one_line(command, name, portllm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = portllm(*command, name)
    assert told.status == 1
    assert told.err.startswith("portllm: ")
    assert len(told.err) < 400


def test_the_shell_completes_commands(monkeypatch):
    monkeypatch.setenv("_PORTLLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "portllm ins")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['portllm']; from portllm.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["inspect"]
