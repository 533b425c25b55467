"""Inputs as nobody means them: pipes, devices, loops, folders for files and files for folders, names that are none.

They stand where a model, a patch, a data file or a key is asked for, or take the place of a file in a whole folder.
"""

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import sys
from unittest import mock

from portllm.cli.main import main
from tests.safetensors_files import write_tensors

HANGS_AFTER_SECONDS = 60
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2

QUARTER = bytes(16)
WEIGHTS = {
    "model.embed_tokens.weight": ("F32", (4, 4), 4 * QUARTER),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (4, 4), 4 * QUARTER),
}
FACTORS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", (2, 4), 2 * QUARTER),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F32", (4, 2), 2 * QUARTER),
}
MODEL_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}

MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "portllm.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "patch.json")


class Hangs(BaseException):
    """The program does not end. No `except` of the program is meant for it, as one of `OSError` would be."""


def write_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    write_tensors(folder / "model.safetensors", WEIGHTS)
    return folder


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG))
    write_tensors(folder / "adapter_model.safetensors", FACTORS)
    return folder


def sparse(path):
    with open(path, "wb") as stream:
        stream.truncate(10**12)


def loop(path):
    path.symlink_to(path)


def device(path):
    path.symlink_to("/dev/zero")


def deep(path):
    path.write_bytes(b"[" * 200_000)


def noise(path):
    path.write_bytes(bytes(range(256)) * 8)


def half_a_pair(path):
    path.write_bytes(rb'{"q": "\ud800", "a": "b", "base_model_name_or_path": "\ud800"}' + b"\n")


def unreadable(path):
    path.write_bytes(b"{}")
    path.chmod(0)


ODD_FILES = (os.mkfifo, os.mkdir, device, loop, sparse, deep, noise, half_a_pair, unreadable)


def odd_places(room):
    """Paths by what is odd about them."""
    room.mkdir()
    for make in ODD_FILES:
        make(room / make.__name__)
    (room / "empty").touch()
    odd_name = os.fsdecode(os.fsencode(room) + b"/\xff\xfe.jsonl")
    shutil.copyfile(room / "noise", odd_name)
    (room / "nul.toml").write_text(
        'patches = ["a\\u0000b"]\nevolved = ["c\\u0000"]\ndo = ["port"]\noutput = "\\u0000"\n'
    )
    (room / "deep.toml").write_text("a = " + "[" * 20_000 + "]" * 20_000)
    (room / "dotted.toml").write_text(".".join("a" * 20_000) + " = 1")
    for mode in (0o111, 0o444, 0):
        write_model(room / f"model {mode:o}").chmod(mode)
        write_adapter(room / f"adapter {mode:o}").chmod(mode)
    (room / "fixed").mkdir(mode=0o555)
    names = sorted(os.listdir(room))
    return {
        **{ascii(name): room / name for name in names},
        "device": "/dev/zero",
        "terminal": "/dev/tty",
        "too long": "x" * 5000,
        "path too long": "x/" * 3000,
        "below a file": room / "noise" / "x",
        "below a fixed folder": room / "fixed" / "x",
        "below a locked folder": room / "model 0" / "x",
        "missing": room / "missing",
        "nothing": "",
    }


def odd_folders(room):
    """Models and adapters, each with one odd file."""
    room.mkdir()
    found = {}
    for write, files in ((write_model, MODEL_FILES), (write_adapter, ADAPTER_FILES)):
        for file in files:
            for make in ODD_FILES:
                folder = write(room / f"{make.__name__} {file}")
                (folder / file).unlink(missing_ok=True)
                make(folder / file)
                found[folder.name] = folder
    for write in (write_model, write_adapter):
        folder = write(room / f"{write.__name__} odd name")
        shutil.copyfile(folder / os.listdir(folder)[0], os.fsdecode(os.fsencode(folder) + b"/\xff.json"))
        found[folder.name] = folder
    return found


@contextlib.contextmanager
def bound_by_permissions():
    """Root may read everything; in this block, on this thread, it may not."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(head, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
    assert libc.capset(head, less) == 0
    try:
        yield
    finally:
        assert libc.capset(head, before) == 0


def run(*arguments):
    """How the program ends with these arguments: its status, and what it says.

    Whatever is no error of ours comes out as it is; so does `Hangs`, where the program does not end.
    """

    def stop(*_):
        raise Hangs(f"still busy after {HANGS_AFTER_SECONDS} seconds")

    said, before = io.StringIO(), (signal.signal(signal.SIGALRM, stop), signal.getsignal(signal.SIGTERM))
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        with (
            mock.patch.object(sys, "argv", ["portllm", *map(str, arguments)]),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(said),
            bound_by_permissions(),
        ):
            main()
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code or 0, said.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])
