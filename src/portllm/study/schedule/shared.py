"""Whether a worker sees the same folder as the run that it works for: by a mark in it, and with patience."""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path

from portllm.errors import OutputError
from portllm.files.own_files import write_text

MARK_FILE = ".study.mark"

PATIENCE_SECONDS = 60.0
"""A network file system may show what another machine wrote so much later: NFS asks again after a minute at most."""

PAUSE_SECONDS = 0.2


def leave_mark(out: Path) -> str:
    """Write a mark into a folder that no other folder has; returns it."""
    mark = secrets.token_hex(16)
    write_text(out / MARK_FILE, mark)
    return mark


def require_mark(out: Path, mark: str) -> None:
    """Raise unless this machine sees the mark.

    Raises:
        OutputError: It does not, within `PATIENCE_SECONDS`.
    """
    if not appears(lambda: _read(out / MARK_FILE) == mark):
        raise OutputError(
            f"'{out}': on machine '{socket.gethostname()}' this is not the study's folder. All workers must reach "
            "it under the same path: pass one on a shared file system with --output."
        )


def appears(there: Callable[[], bool]) -> bool:
    """Whether something is there, or comes to be there within `PATIENCE_SECONDS`."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not there():
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE_SECONDS)
    return True


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
