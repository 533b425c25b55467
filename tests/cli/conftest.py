"""Run the program in this process, as a user would call it."""

import sys
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Result:
    """What a call of the program came to."""

    status: int
    out: str
    err: str


@pytest.fixture
def portllm(monkeypatch, capsys):
    """`portllm("inspect", path)` runs a command and returns exit status, stdout and stderr."""
    from portllm.cli.main import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["portllm", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run
