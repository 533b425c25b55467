"""Text on its way to a terminal: what files say can neither move the cursor nor begin a line of its own."""

import contextlib
import json
import os
import sys
from typing import IO

import typer

from portllm.errors import OutputError
from portllm.show.printable import one_line


def say(text: str, *, err: bool = False) -> None:
    """Print lines to stdout, or to stderr, where what cannot be told is let go.

    Raises:
        OutputError: stdout is closed or full, and who asked for a result would go without.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:  # it was closed before the program began
        if err:
            return
        raise OutputError("stdout: is closed, so no result can be printed.")
    encoding = stream.encoding or "utf-8"
    lines = "\n".join(map(one_line, text.split("\n")))
    try:
        # What a terminal of another encoding lacks is escaped too.
        typer.echo(lines.encode(encoding, "backslashreplace").decode(encoding), err=err)  # noqa: TID251 (its one place)
    except OSError as error:
        let_go(stream)
        if not err:
            raise OutputError(f"stdout: cannot be written to: {error.strerror}.") from error


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
    say(text if text.replace("\n", "").isprintable() else "".join(whole))
