"""Text on its way to a terminal: what files say can neither move the cursor nor begin a line of its own."""

import json
import sys

import typer

from portllm.show.printable import one_line


def say(text: str, *, err: bool = False) -> None:
    """Print lines to stdout, or to stderr."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    lines = "\n".join(map(one_line, text.split("\n")))
    # What a terminal of another encoding lacks is escaped too.
    typer.echo(lines.encode(encoding, "backslashreplace").decode(encoding), err=err)  # noqa: TID251 (its one place)


def print_json(value: object) -> None:
    """Print a JSON value to stdout; what cannot be printed stands in it as JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    whole = (sign if sign == "\n" or sign.isprintable() else json.dumps(sign)[1:-1] for sign in text)
    say(text if text.replace("\n", "").isprintable() else "".join(whole))
