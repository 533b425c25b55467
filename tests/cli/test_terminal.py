"""What files of strangers say does not move the cursor, forge a line, or break the output."""

import io
import json
import re
import sys

import pytest

from portllm.cli.terminal import print_json, say
from portllm.files.seal import render_sealed
from tests.safetensors_files import write_tensors

EVIL = "\x1b[2J\x1b]0;title\x07\r\n  ok  signature  by the key of mine\nverified\u202e\x9b1A\x7f\u2028"
SPOKEN = re.compile(r"[^\x20-\x7e\n]")


def test_what_a_terminal_of_another_encoding_lacks_is_escaped(monkeypatch):
    for encoding, shown in (
        ("ascii", b"\\xe9 \\u6a21\n"),
        ("latin-1", b"\xe9 \\u6a21\n"),
        ("utf-8", "é 模\n".encode()),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, newline="\n"))
        say("é 模")
        assert raw.getvalue() == shown


def test_json_is_the_same_value_with_escapes(capsys):
    value = {EVIL: [EVIL, "é 模", "\U000e0001", {"a": 1}]}
    print_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert out.replace("\n", "").isprintable()


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter of one module with fields of its own."""

    def write(**fields):
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], **fields}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        factors = {"A": ("F32", (1, 2), bytes(8)), "B": ("F32", (3, 1), bytes(12))}
        write_tensors(
            tmp_path / "adapter_model.safetensors",
            {f"base_model.model.h.q_proj.lora_{name}.weight": tensor for name, tensor in factors.items()},
        )
        return tmp_path

    return write


def test_the_name_of_a_base_stays_on_its_line(portllm, adapter):
    folder = adapter(base_model_name_or_path=EVIL)
    result = portllm("inspect", folder)
    assert result.status == 0
    assert not SPOKEN.search(result.out)
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "adapter",
        "modules",
        "rank",
        "scale",
        "size",
        "warning",
        "base",
    ]
    assert json.loads(portllm("inspect", folder, "--json").out)["base_name"] == EVIL


@pytest.mark.parametrize(
    "fields",
    [{EVIL: True}, {"peft_type": EVIL}, {"target_modules": EVIL + "("}, {"rank_pattern": {EVIL + "(": 1}}],
    ids=["field", "kind", "targets", "pattern"],
)
def test_a_refusal_of_a_hostile_adapter_is_one_plain_line(portllm, adapter, fields):
    result = portllm("inspect", adapter(**fields))
    assert (result.status, result.out) == (1, "")
    assert not SPOKEN.search(result.err)
    assert len(result.err.splitlines()) == 1


def test_a_tensor_cannot_speak_through_its_name(portllm, tmp_path):
    write_tensors(tmp_path / "model.safetensors", {EVIL: ("F32", (1,), bytes(4))})
    result = portllm("inspect", tmp_path)
    assert result.status == 1
    assert not SPOKEN.search(result.err)
    assert len(result.err.splitlines()) == 1


def test_a_manifest_cannot_write_a_verdict(portllm, tmp_path):
    mark = {"name": EVIL, "fingerprint": EVIL, "digest": EVIL}
    write_tensors(tmp_path / "model.safetensors", {"w": ("F32", (1,), bytes(4))})
    (tmp_path / EVIL).write_text("")
    forged = {"output": mark, "into": mark, "files": {EVIL: "0" * 64}}
    (tmp_path / "portllm.json").write_text(render_sealed(forged))
    result = portllm("verify", tmp_path)
    assert result.status == 3
    assert not SPOKEN.search(result.out)
    lines = result.out.splitlines()
    assert lines[0].startswith("not verified (")
    assert not any(line.startswith(("  ok  signature", "verified")) for line in lines)
    assert json.loads(portllm("verify", tmp_path, "--json").out)["verified"] is False


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(("set_to", "colored"), [(None, True), ("1", False)])
def test_a_verdict_has_color_on_a_terminal_unless_its_user_wants_none(monkeypatch, set_to, colored):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if set_to is not None:
        monkeypatch.setenv("NO_COLOR", set_to)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    say("holds: " + "word " * 20 + "\nthe rest", tone="good")
    shown = terminal.getvalue()
    assert ("\x1b[32m" in shown) is colored
    assert shown.count("\n") == 4
    assert re.sub(r"\x1b\[\d+m", "", shown).endswith("\nthe rest\n")


def test_json_is_not_wrapped_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_json({"text": "word " * 40})
    assert json.loads(terminal.getvalue()) == {"text": "word " * 40}


def test_what_is_piped_has_whole_lines_and_no_color(capsys):
    say("word " * 60, tone="bad")
    assert capsys.readouterr().out == "word " * 60 + "\n"
