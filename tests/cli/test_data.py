import json

import pytest
import typer

from portllm.cli.data import given_prompt, unescape


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"Q: {q}\nA:", "Q: {q}\nA:"), (r"{q}\tA:", "{q}\tA:"), (r"C:\\new {q}", r"C:\new {q}"), ("{q}\nA", "{q}\nA")],
)
def test_escapes_in_a_prompt_mean_what_they_say(typed, meant):
    assert unescape(typed) == meant


@pytest.mark.parametrize("typed", [r"\frac {q}", "{q}\\"])
def test_a_backslash_that_is_no_escape_is_refused(typed):
    with pytest.raises(typer.BadParameter, match=r"is not an escape; .* Write a backslash as \\\\"):
        unescape(typed)


def test_a_prompt_in_a_file_is_taken_as_it_is_but_for_its_last_newline(tmp_path):
    (tmp_path / "prompt.txt").write_bytes("\ufeffQ: {q}\\n\r\nA:\r\n".encode())
    assert given_prompt(None, tmp_path / "prompt.txt") == "Q: {q}\\n\r\nA:"
    with pytest.raises(typer.BadParameter, match="not both"):
        given_prompt("{q}", tmp_path / "prompt.txt")
    with pytest.raises(typer.BadParameter, match="cannot be read"):
        given_prompt(None, tmp_path / "nothing.txt")


def test_captured_prompts_are_those_that_rows_are_asked_with(portllm, tiny, tmp_path):
    from portllm.running.data import read_data

    how = ("--prompt", r"Q: {q}\nA:", "--completion", "kind")
    for name, what in (("adapter", ("--adapter", tiny("adapter"))), ("tuned", ("--tuned", tiny("evolved", drift=0.1)))):
        made = portllm("capture", *what, "--base", tiny("base"), *how, "-o", tmp_path / name)
        assert made.status == 0, made.err
        (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "who?", "kind": "person"}))
        (row,) = read_data(tmp_path / "rows.jsonl", tmp_path / name).rows
        assert (row.prompt, row.completion) == ("Q: who?\nA:", "person")


def test_captured_prompts_that_show_the_answer_are_refused(portllm, tiny, tmp_path):
    which = ("capture", "--adapter", tiny("adapter"), "--base", tiny("base"), "-o", tmp_path / "patch")
    assert portllm(*which, "--completion", "kind").status == 2
    shown = portllm(*which, "--prompt", "{q} {kind}", "--completion", "kind")
    assert shown.status == 1
    assert "leaves nothing to learn" in shown.err
    assert not (tmp_path / "patch").exists()


def test_labels_in_use_are_printed_and_odd_ones_are_questioned(portllm, tiny, tmp_path):
    kinds = ["refund"] * 6 + ["account"] * 5 + ["refnd", "acount"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{number}?", "kind": kind}) + "\n" for number, kind in enumerate(kinds)))
    how = ("--data", rows, "--prompt", "{q}", "--completion", "kind", "-o", tmp_path / "patch", "--dry-run")
    found = portllm("train", "--base", tiny("base"), *how)
    assert "labels: 'refund' 6, 'account' 5, 'refnd' 1, 'acount' 1" in found.err
    rows.write_text(rows.read_text() * 3 + json.dumps({"q": "?", "kind": "other"}))
    found = portllm("train", "--base", tiny("base"), *how, "--quiet")
    assert "warning: label 'refnd' (3 rows) is nearly 'refund' (18 rows)" in found.err
    assert "warning: label 'other' is the answer of one row only" in found.err


@pytest.mark.parametrize(("command", "way"), [("evaluate", "--judge text"), ("certify", "--answers exact")])
def test_answers_that_are_texts_are_not_taken_for_labels(portllm, tiny, tmp_path, command, way):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "q", "completion": f"answer {n}"}) + "\n" for n in range(30)))
    sides = ("--patch", tiny("adapter"), "--ported", tiny("adapter"), "--base", tiny("base"), "--evolved", tiny("base"))
    out = () if command == "evaluate" else ("-o", tmp_path / "out")
    found = portllm(command, *sides, "--data", rows, *out)
    assert found.status == 1
    assert "30 different answers, which are texts" in found.err
    assert way in found.err
