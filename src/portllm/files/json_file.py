"""JSON files of others, read with a limit on their size."""

import os
from pathlib import Path

from portllm.errors import CheckpointError
from portllm.files.json_text import parse_json

MAX_JSON_BYTES = 64_000_000


def read_json(
    file: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError, infinities: bool = False
) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for; `infinities` as for `json_text.parse_json`.

    Raises:
        error: The file is none (a pipe could be waited for forever), is too large, is not
            JSON that every reader reads alike, or is not an object.
    """
    try:
        if file.exists() and not file.is_file():
            raise error(f"'{file}': is not a file. Fetch or write it again.")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            text = stream.read(min(size, MAX_JSON_BYTES) + 1)  # as much room is made as is asked for
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    if len(text) > MAX_JSON_BYTES:
        raise error(f"'{file}': has {size} bytes; at most {MAX_JSON_BYTES} are read.")
    try:
        value = parse_json(text, infinities=infinities)
    except ValueError as problem:
        raise error(f"'{file}': is not valid JSON ({problem}). Fetch or write it again.") from problem
    if not isinstance(value, dict):
        raise error(f"'{file}': must hold a JSON object, holds a {type(value).__name__}.")
    return value


def read_config(file: Path) -> dict[str, object]:
    """A model's `config.json`, in which transformers writes infinities as Python does.

    Raises:
        CheckpointError: As `read_json`.
    """
    return read_json(file, infinities=True)
