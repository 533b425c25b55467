"""Text on its way to a terminal: what files say can neither move the cursor nor begin a line of its own."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from typing import IO, Protocol, runtime_checkable

import typer

from portllm.errors import OutputError
from portllm.show.headline import Tone
from portllm.show.printable import one_line
from portllm.show.table import wrapped

NARROWEST = 40
"""Narrower terminals wrap as they like."""


@runtime_checkable
class Stream(Protocol):
    """What text can be written to, such as stdout."""

    def isatty(self) -> bool:
        """Whether it ends at a terminal."""
        ...


COLORS: Mapping[Tone, str | None] = {"good": "green", "doubt": "yellow", "bad": "red", "plain": None}


def say(text: str, *, err: bool = False, tone: Tone | None = None, whole: bool = False) -> None:
    """Print lines to stdout, or to stderr, where what cannot be told is let go.

    On a terminal, lines are wrapped by words.

    Args:
        text: What to say.
        err: To stderr.
        tone: That of the first line, a verdict: in color on a terminal, unless NO_COLOR is set.
        whole: Leave every line as long as it is.

    Raises:
        OutputError: stdout is closed or full, and who asked for a result would go without.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # it was closed before the program began
        if err:
            return
        raise OutputError("stdout: is closed, so no result can be printed.")
    encoding = stream.encoding or "utf-8"
    lines = [one_line(line) for line in text.split("\n")]
    # What a terminal of another encoding lacks is escaped too.
    lines = [line.encode(encoding, "backslashreplace").decode(encoding) for line in lines]
    width = None if whole else width_of(stream)
    # What stands below a line that ends with a colon is a command: it stays whole, to be copied.
    commands = {at for at in range(1, len(lines)) if lines[at].startswith("  ") and lines[at - 1].endswith(":")}
    shown = [
        line if width is None or at in commands else "\n".join(wrapped(line, width)) for at, line in enumerate(lines)
    ]
    if tone is not None and has_color(stream):
        shown[0] = typer.style(shown[0], fg=COLORS[tone], bold=True)
    try:
        typer.echo("\n".join(shown), err=err)  # noqa: TID251 (its one place)
    except OSError as error:
        let_go(stream)
        if not err:
            raise OutputError(f"stdout: cannot be written to: {error.strerror}.") from error


def width_of(stream: Stream | None) -> int | None:
    """Columns of the terminal that a stream ends at; None where it ends elsewhere, and lines are read by programs."""
    if stream is None or not stream.isatty():
        return None
    return max(shutil.get_terminal_size().columns, NARROWEST)


def has_color(stream: Stream) -> bool:
    """Whether a stream ends at a terminal whose user wants color (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def let_go(stream: IO[str]) -> None:
    """Send what a stream still holds to nowhere, so that the end of the program does not try to write it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor holds nothing back
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_json(value: object) -> None:
    """Print a JSON value to stdout; what cannot be printed stands in it as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    whole = (sign if sign == "\n" or sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)
    say(text if text.replace("\n", "").isprintable() else "".join(whole), whole=True)
