"""Text on its way to a terminal: what files say can neither move the cursor nor begin a line of its own.

Names of models, modules and tokens come from files of strangers. A terminal obeys control characters in them: they
could clear a verdict and write another one. Here they are written as escapes; so is what turns the direction of
writing, and half of a surrogate pair, which no terminal can be sent.
"""

import json
import sys

import typer


def one_line(text: str) -> str:
    r"""A text that a file may have had a hand in, on one line, with every character that cannot be printed escaped.

    Example:
        >>> print(one_line("q_proj\x1b[2J\nverified"))
        q_proj\x1b[2J\nverified
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


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
