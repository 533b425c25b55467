"""Lines and tables in the width of a terminal: wrapped by words, nothing lost, numbers whole."""

import pytest

from portllm.show.table import columns, wrapped

ROWS = [
    ("", "score", "95 % interval", "loss", "95 % interval"),
    ("evolved + ported, merged", "83.3 %", "71.9 to 90.7", "0.459", "0.341 to 0.577"),
]


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_a_table_fits_and_loses_no_number(width):
    lines = columns(ROWS, width=width)
    assert max(map(len, lines)) <= width
    shown = "\n".join(lines)
    assert all(cell in shown for cell in ROWS[1][1:])


def test_a_table_that_fits_is_left_alone():
    assert columns(ROWS, width=200) == columns(ROWS)


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize(
    "line", ["  note: " + "some words of 3 % " * 12, "  size   " + "the norm of it " * 12, "plain " * 40]
)
def test_lines_are_wrapped_by_words_under_their_text(line, width):
    lines = wrapped(line, width)
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == " ".join(line.split())
    assert not any(part.strip().startswith("%") for part in lines)


def test_what_is_left_of_a_branch_stands_under_its_text():
    assert wrapped("  |  `- to v2 by 'add', and more", 24) == ["  |  `- to v2 by 'add',", "        and more"]


def test_a_command_stays_on_its_line_to_be_copied():
    command = "  portllm evaluate " + "--base somewhere " * 9
    assert wrapped(command, 80) == [command]
