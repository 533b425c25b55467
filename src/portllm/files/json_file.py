"""JSON files of others, read with a limit on their size."""

from pathlib import Path

from portllm.errors import CheckpointError
from portllm.files.content import mistaken
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json

MAX_JSON_BYTES = 64_000_000
"""Twice the largest `tokenizer.json` and index that are around, of 33 MB."""

MAX_JSON_VALUES = 6_000_000
"""Three times what the largest of them holds. A value takes some 200 bytes of Python's memory, however short it is."""

MAX_CONFIG_BYTES = 8_000_000
"""Of a configuration: the largest that are around, with thousands of labels or added tokens, have one or two."""


def read_json(
    file: Path,
    *,
    error: type[CheckpointError] | type[Exception] = CheckpointError,
    most: int = MAX_JSON_BYTES,
    infinities: bool = False,
) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for; `infinities` as for `json_text.parse_json`.

    Raises:
        error: As `read_json_text`; or it is not JSON that every reader reads alike, or not an object.
    """
    text = read_json_text(file, error=error, most=most)
    try:
        value = parse_json(text, infinities=infinities)
    except ValueError as problem:
        if (other := mistaken(text)) is not None:
            raise error(f"'{file}': {other}") from problem
        raise error(f"'{file}': is not valid JSON ({problem}). Download or write it again.") from problem
    if not isinstance(value, dict):
        raise error(
            f"'{file}': must contain a JSON object, not a {type(value).__name__}: another file has taken its "
            "name. Download it again, or copy it from where it was saved."
        )
    return value


def read_config(file: Path) -> dict[str, object]:
    """A model's `config.json`, in which transformers writes infinities as Python does; otherwise as `read_json`."""
    return read_json(file, most=MAX_CONFIG_BYTES, infinities=True)


def read_json_text(
    file: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError, most: int = MAX_JSON_BYTES
) -> bytes:
    """The content of a JSON file, which is not so large that what is made of it could fill a machine's memory.

    Raises:
        error: The file is none, cannot be read, or is too large.
    """
    try:
        text = read_input(file, most=most)
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise error(f"'{file}': contains more than {MAX_JSON_VALUES} values; no model file has that many.")
    return text
