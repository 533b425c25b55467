"""A runtime runs in a process of its own, which says why it fails and leaves nothing behind."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

from portllm.errors import RuntimeFailedError
from portllm.proving.runtimes.contract import Served
from portllm.proving.runtimes.program import started_process, started_program

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(1, f"{child.pid}\\n".encode())
time.sleep(600)
"""
"""A process that starts another and waits."""


def test_a_runtime_that_ends_is_told_with_its_last_lines():
    program = "import sys; sys.stderr.write('\\x1b[31mno room\\x1b[0m\\n' * 50 + 'at all\\n'); sys.exit(3)"
    with started_process([sys.executable, "-c", program]) as process:
        process.popen.wait()
        error = process.ended("vllm")

    said = str(error).splitlines()
    assert said[0] == "vllm: ended with status 3."
    assert said[-2:] == ["no room", "at all"]
    assert len(said) < 20


def test_a_runtime_that_a_signal_ended_is_told_so():
    with started_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) as process:
        process.popen.wait()
        assert str(process.ended("vllm")) == "vllm: was ended by SIGKILL."


def test_what_a_runtime_has_started_is_gone_after_the_block():
    reading, writing = os.pipe()
    with (
        contextlib.suppress(KeyboardInterrupt),
        started_process([sys.executable, "-c", PARENT], stdout=writing) as process,
    ):
        os.close(writing)
        child = int(os.read(reading, 20))
        raise KeyboardInterrupt
    # The pipe ends when nobody holds its other end any more: neither the process nor what it has started.
    rest = os.read(reading, 1)
    os.close(reading)

    assert process.popen.returncode == -15
    assert child > 0
    assert rest == b""


def test_a_program_says_why_a_runtime_does_not_load(tmp_path):
    served = Served(base=tmp_path, patch=tmp_path, python=Path(sys.executable), max_tokens=64, ids_by_text=dict)
    with pytest.raises(RuntimeFailedError, match="No module named 'xllamacpp'"), started_program("llamacpp", served):
        pass


def test_a_python_that_cannot_be_run_is_told(tmp_path):
    with pytest.raises(RuntimeFailedError, match="cannot be run"), started_process([str(tmp_path / "python")]):
        pass
