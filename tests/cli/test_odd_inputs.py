"""Whatever stands where a command reads or writes, it ends with a message and never with a traceback or a wait."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.odd_places import odd_folders, odd_places, run, write_adapter, write_model

ROWS = "".join(f'{{"q": "x {number}", "a": "{"yz"[number % 2]}"}}\n' for number in range(24))
ASKED = ("--prompt", "{q}", "--completion", "a")

COMMANDS = {
    "inspect": "inspect ODD",
    "capture, adapter": "capture --adapter ODD --base MODEL -o OUT",
    "capture, base": "capture --adapter ADAPTER --base ODD -o OUT",
    "capture, tuned": "capture --base MODEL --tuned ODD -o OUT",
    "check, patch": "check ODD --base MODEL --evolved MODEL",
    "check, base": "check ADAPTER --base ODD --evolved MODEL",
    "check, text": "check ADAPTER --base MODEL --evolved MODEL --text ODD --prompt {q}",
    "check, page": "check ADAPTER --base MODEL --evolved MODEL --html ODD",
    "port, patch": "port ODD --evolved MODEL -o OUT",
    "port, evolved": "port ADAPTER --evolved ODD -o OUT",
    "merge, patch": "merge ODD --into MODEL -o OUT",
    "merge, into": "merge ADAPTER --into ODD -o OUT",
    "merge, undo": "merge --undo ODD",
    "combine": "combine ODD ADAPTER -o OUT",
    "verify": "verify ODD",
    "verify, base": "verify PATCH --base ODD",
    "verify, key": "verify PATCH --public-key ODD",
    "verify, signature": "verify PATCH --public-key KEY --signature ODD",
    "sign": "sign ODD --key KEY",
    "sign, key": "sign PATCH --key ODD",
    "sign, password": "sign PATCH --key KEY --password-file ODD",
    "train, data": "train --base MODEL --data ODD ASKED -o OUT",
    "evaluate, data": "evaluate --base MODEL --patch ADAPTER --evolved MODEL --ported ADAPTER --data ODD ASKED",
    "certify, data": "certify ADAPTER --base MODEL --data ODD --evolved MODEL --ported ADAPTER ASKED -o OUT",
    "fleet": "fleet ODD",
    "study": "study run ODD --dry-run",
    "study, report": "study report ODD",
}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    write_model(folder / "MODEL")
    write_adapter(folder / "ADAPTER")
    assert run("capture", "--adapter", folder / "ADAPTER", "--base", folder / "MODEL", "-o", folder / "PATCH")[0] == 0
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "KEY").write_bytes(key)
    yield folder
    for place in folder.rglob("*"):  # so that the folder can be removed
        if place.is_dir() and not place.is_symlink():
            place.chmod(0o755)


@pytest.fixture(autouse=True)
def apart(room, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(room / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(room)


@pytest.fixture(scope="module")
def places(room):
    return odd_places(room / "places")


@pytest.fixture(scope="module")
def folders(room):
    return odd_folders(room / "folders")


def try_all(command, inputs, room):
    """What went wrong with any of the inputs."""
    wrong = []
    for what, place in inputs.items():
        shutil.rmtree(room / "OUT", ignore_errors=True)
        words = [room / word if (room / word).exists() or word == "OUT" else word for word in command.split()]
        arguments = [part for word in words for part in (ASKED if word == "ASKED" else (word,))]
        try:
            status, said = run(*(place if word == "ODD" else word for word in arguments))
        except BaseException as error:
            wrong.append((what, repr(error)[:200]))
            continue
        if status not in (0, 1, 2, 3) or (status in (1, 2) and not said):
            wrong.append((what, status, said))
    return wrong


@pytest.mark.parametrize(("number", "command"), [*enumerate(COMMANDS.values())], ids=COMMANDS)
def test_no_odd_place_makes_a_command_crash_or_wait(number, command, places, room):
    # Every third place, beginning with another one for each command: every kind of place meets nine commands.
    third = dict(list(places.items())[number % 3 :: 3])
    assert try_all(command, third, room) == []


@pytest.mark.slow
def test_no_odd_place_makes_any_command_crash_or_wait(places, room):
    assert {name: found for name, command in COMMANDS.items() if (found := try_all(command, places, room))} == {}


@pytest.mark.parametrize("command", [COMMANDS[name] for name in ("inspect", "verify", "check, base")])
def test_no_odd_file_in_a_folder_makes_a_command_crash_or_wait(command, folders, room):
    assert try_all(command, folders, room) == []


@pytest.mark.slow
def test_no_odd_file_makes_any_command_crash_or_wait(folders, room, capsys):
    wrong = {name: found for name, command in COMMANDS.items() if (found := try_all(command, folders, room))}
    with capsys.disabled():
        sys.stdout.write(f"\n{len(COMMANDS) * len(folders)} runs on odd folders\n")
    assert wrong == {}


PROGRAM = [sys.executable, "-m", "portllm"]


ENDS = (">/dev/full", ">&-", "2>&-", ">&- 2>&-", "2>/dev/full", "| head -c 1")
TOLD = {
    "inspect MODEL": ENDS,
    "--help": (">/dev/full", ">&-", "| head -c 1"),  # it goes to stdout alone
    "inspect missing": ("2>&-", ">&- 2>&-", "2>/dev/full"),  # it goes to stderr alone
}


@pytest.mark.parametrize(("command", "end"), [(command, end) for command, ends in TOLD.items() for end in ends])
def test_output_that_cannot_be_written_is_told_once(end, command, room):
    line = f"set -o pipefail; {' '.join(PROGRAM)} {command} {end}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in (0, 1)
    if end == ">/dev/full" and command == "inspect MODEL":
        assert done.returncode == 1
        assert done.stderr == "portllm: stdout: cannot be written to: No space left on device.\n"


@pytest.mark.parametrize("command", [
    "inspect NAME", "capture --adapter ADAPTER --base NAME -o OUT", "merge ADAPTER --into MODEL -o NAME2",
    "merge NAMED --into MODEL -o OUT", "combine NAMED ADAPTER -o OUT",
])  # fmt: skip
def test_what_no_record_could_name_is_refused(command, room):
    names = {word: os.fsdecode(word.encode() + b"\xff") for word in ("NAME", "NAMED", "NAME2")}
    for source, name in (("MODEL", "NAME"), ("ADAPTER", "NAMED")):
        shutil.copytree(room / source, room / names[name], dirs_exist_ok=True)
    status, said = run(*(names.get(word, word) for word in command.split()))
    assert status == 1
    assert "so no record can name it" in said
    assert not (room / names["NAME2"]).exists()
