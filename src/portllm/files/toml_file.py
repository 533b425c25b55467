"""TOML files that people write: read, and every problem told at once with its line and key."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from portllm.errors import PortLLMError
from portllm.files.input_file import read_input
from portllm.files.json_text import MAX_DEPTH, require_shallow
from portllm.files.toml_text import line_of

MAX_TOML_BYTES = 4_000_000
"""Which is a fleet of forty thousand patches, each by its name."""

_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*"""
_DEEP_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:{_PART}){{{MAX_DEPTH}}}", re.MULTILINE)
"""A key of more parts than values may be nested; the time that `tomllib` takes for one grows with their square."""


def read_toml(file: Path, *, kind: str, error: type[PortLLMError]) -> tuple[str, dict[str, Any]]:
    """The text of a file, and its values.

    Args:
        file: The file.
        kind: What it describes, such as `fleet`.
        error: What is raised.

    Raises:
        error: The file cannot be read, or is not TOML.
    """
    try:
        text = read_input(file, most=MAX_TOML_BYTES).decode("utf-8")
        if _DEEP_KEY.search(text):
            raise ValueError("a key has too many parts")
        values = tomllib.loads(text)
        require_shallow(values)
        return text, values
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}. Pass the {kind}'s TOML file.") from problem
    except RecursionError as problem:
        raise error(f"'{file}': is not valid TOML: it is nested too deeply.") from problem
    except ValueError as problem:  # of TOML, which names the line, or of UTF-8
        raise error(f"'{file}': is not valid TOML: {problem}. Pass the {kind}'s TOML file, or correct it.") from problem


def told(file: Path, text: str, problems: Iterable[tuple[tuple[str, ...], str]]) -> str:
    """A line for each problem, in the order of the file.

    Args:
        file: The file.
        text: What it says.
        problems: The path to a key, and what is wrong with it.
    """
    lines = []
    for path, problem in problems:
        number = line_of(text, path)
        place = f", line {number}" if number else ""
        end = "" if problem.endswith((".", "?")) else "."
        lines.append((number or 0, f"'{file}'{place}, {'.'.join(path)}: {problem}{end}"))
    return "\n".join(line for _, line in sorted(lines))
