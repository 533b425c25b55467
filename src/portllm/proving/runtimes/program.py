"""A runtime that is a library: a small program loads it, under the Python that has it, and answers over a pipe.

The program ends when its standard input does, so that none outlives this process, however that ends.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import IO, Any

from portllm.errors import RuntimeFailedError
from portllm.proving.runtimes.contract import TOP, Answer, Model, Running, Served

LAST_LINES = 12
"""How many lines of what a runtime said last stand in the message of its end."""

_COLORS = re.compile(r"\x1b\[[0-9;]*m")

END_SECONDS = 10.0
"""How long a runtime has for its end before it is killed."""


@contextlib.contextmanager
def started_program(name: str, served: Served) -> Iterator[Running]:
    """A runtime by its program in `programs`, loaded; ended with the block.

    Raises:
        RuntimeFailedError: It cannot load what is to be served.
    """
    with as_file(files("portllm.proving.runtimes").joinpath("programs")) as programs:
        command = [str(served.python), "-I", str(programs), f"on_{name}"]
        with started_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            running = _Program(name, process)
            running.load(served)
            yield running


class _Program:
    def __init__(self, name: str, process: "Process") -> None:
        self._name, self._process = name, process
        self.version = ""

    def load(self, served: Served) -> None:
        # Absolute without resolving links: a file of the hub's cache is a link with the name that counts.
        paths = {"base": os.path.abspath(served.base), "patch": os.path.abspath(served.patch)}
        self.version = self._exchange({**paths, "top": TOP, "max_tokens": served.max_tokens})["version"]

    def ask(self, model: Model, prompt: str) -> Answer:
        said = self._exchange({"model": model, "prompt": prompt})
        return Answer({int(token): float(value) for token, value in said["top"]}, said["n_prompt_tokens"])

    def _exchange(self, request: Mapping[str, object]) -> dict[str, Any]:
        pipe, reply = self._process.popen.stdin, b""
        if pipe is None or self._process.popen.stdout is None:
            raise AssertionError("it was started with pipes")
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
            reply = self._process.popen.stdout.readline()
        if not reply.endswith(b"\n"):
            raise self._process.ended(self._name)
        said: dict[str, Any] = json.loads(reply)
        if "error" in said:
            raise RuntimeFailedError(f"{self._name}: fails: {_beginning(said['error'])}{self._process.last_lines()}")
        return said


def _beginning(error: str) -> str:
    """What an error says, without the frames that some runtimes put behind it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    own = itertools.takewhile(lambda line: not re.match(r"(\d+:|stack backtrace)", line), lines)
    return "\n".join(itertools.islice(own, LAST_LINES)) or "it does not say why"


class Process:
    """A process in a group of its own, and the file that holds what it says on stderr."""

    def __init__(self, popen: "subprocess.Popen[bytes]", said: IO[bytes]) -> None:
        self.popen, self._said = popen, said

    def last_lines(self) -> str:
        """What it has said last, for the end of a message; empty where it has said nothing."""
        self._said.seek(0)
        lines = _COLORS.sub("", self._said.read().decode("utf-8", "replace")).splitlines()
        last = [line for line in lines if line.strip()][-LAST_LINES:]
        return "\n".join(["\nIts last lines:", *last]) if last else ""

    def ended(self, name: str) -> RuntimeFailedError:
        """The error for a process that is not there any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(END_SECONDS)
        status = self.popen.returncode
        how = "no longer answers" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        return RuntimeFailedError(f"{name}: {how}.{self.last_lines()}")


@contextlib.contextmanager
def started_process(
    command: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """A process that runs a runtime; it and all that it has started are gone after the block.

    Args:
        command: What to run.
        stdin: As for `subprocess`.
        stdout: As for `subprocess`; without it, what it prints is kept with what it says on stderr.
        environment: Variables that are set beside those of this process.

    Raises:
        RuntimeFailedError: It cannot be run.
    """
    with tempfile.TemporaryFile() as said:
        try:
            popen = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=said if stdout is None else stdout,
                stderr=said,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
                start_new_session=True,  # a Ctrl-C is ours to handle, and the group can be ended as one
            )
        except OSError as error:
            raise RuntimeFailedError(f"'{Path(command[0])}': cannot be run: {error.strerror}.") from error
        try:
            yield Process(popen, said)
        finally:
            _end(popen)


def _end(popen: "subprocess.Popen[bytes]") -> None:
    """Its input is closed, then it is asked to end, then killed; and what it has started with it."""
    for pipe in (popen.stdin, popen.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    if popen.stdin is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(END_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(END_SECONDS)
