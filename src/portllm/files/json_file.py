"""JSON files of others, read with a limit on their size."""

from pathlib import Path

from portllm.checkpoint.reading.bytes import MAX_CONFIG_BYTES, read_json_text
from portllm.errors import CheckpointError
from portllm.files.json_text import parse_json

MAX_JSON_BYTES = 64_000_000
"""Twice the largest `tokenizer.json` and index that are around, of 33 MB."""


def read_json(
    file: Path,
    *,
    error: type[CheckpointError] | type[Exception] = CheckpointError,
    infinities: bool = False,
    most_bytes: int = MAX_JSON_BYTES,
) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for; `infinities` as for `json_text.parse_json`.

    Raises:
        error: As `read_json_text`; or it is not JSON that every reader reads alike, or not an object.
    """
    text = read_json_text(file, error=error, most_bytes=most_bytes)
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
    return read_json(file, infinities=True, most_bytes=MAX_CONFIG_BYTES)
