"""A tiny model that a stranger gave, any file of it changed, and all that the program has transformers and PEFT do."""

import json
import os
import shutil
import signal
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.integrations import hub_kernels

from portllm.running.encoding import Encoder
from portllm.running.loss import completion_nats
from portllm.running.model import attach_adapter, load_model, load_tokenizer

CPU = torch.device("cpu")
HANGS_AFTER_SECONDS = 60


def use(model, adapter):
    """Reads texts with a model, then with an adapter on it."""
    encoder = Encoder(load_tokenizer(model))
    rows = [encoder.encode(f"Question {number}: what helps? Kind:", "cause", max_tokens=64) for number in range(2)]
    loaded = load_model(model, device=CPU, longest=1000)  # transformers chooses the attention
    with torch.no_grad():
        completion_nats(loaded, rows, device=CPU)
        completion_nats(attach_adapter(loaded, adapter, name="patch").eval(), rows, device=CPU)


def copied(folder, target, files):
    """A folder with some of its files written anew: text, bytes, or what becomes JSON over what stands there."""
    shutil.copytree(folder, target)
    for name, content in files.items():
        file = target / name
        if isinstance(content, dict):
            content = json.dumps((json.loads(file.read_text()) if file.exists() else {}) | content)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return target


@contextmanager
def nothing_happens(room, monkeypatch):
    """In the block nothing is asked for over the network or as a kernel, no file is written, and it ends."""
    asked = []

    def ask(*what, **_):
        asked.append(what)
        raise RuntimeError("not here")

    def stop(*_):
        raise KeyboardInterrupt(f"still busy after {HANGS_AFTER_SECONDS} seconds")

    def files():
        return sorted((str(file), file.stat().st_mtime_ns) for file in Path(room).rglob("*") if file.is_file())

    before, handler = files(), signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS_AFTER_SECONDS)
    try:
        with monkeypatch.context() as patched, tempfile.TemporaryDirectory() as temporary:
            patched.setattr(tempfile, "tempdir", temporary)
            patched.setattr(socket.socket, "connect", ask)
            patched.setattr(hub_kernels, "is_kernels_available", lambda: True)
            patched.setattr(hub_kernels, "get_kernel", ask)
            try:
                yield
            finally:
                left = os.listdir(temporary)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert (asked, left) == ([], [])
    assert files() == before
