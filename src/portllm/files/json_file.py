"""JSON files of others, read with a limit on their size."""

from pathlib import Path

from portllm.errors import CheckpointError
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json

MAX_JSON_BYTES = 64_000_000
"""The largest real files are tokenizers, of some 35 MB, and indexes of mixtures of experts, of some 20 MB."""


MAX_CONFIG_BYTES = 8_000_000
"""The largest real configurations have some 2 MB: names of thousands of labels, or of modules that are not quantized.
An adapter's with a rank for each expert of a large model would have 6 MB.
"""


def read_json(
    file: Path,
    *,
    error: type[CheckpointError] | type[Exception] = CheckpointError,
    most: int = MAX_JSON_BYTES,
    infinities: bool = False,
) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for; `infinities` as for `json_text.parse_json`.

    Raises:
        error: The file is none, has more than `most` bytes, is not JSON that every reader reads alike, or is not an
            object.
    """
    try:
        value = parse_json(read_input(file, most=most), infinities=infinities)
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    except ValueError as problem:
        raise error(f"'{file}': is not valid JSON ({problem}). Fetch or write it again.") from problem
    if not isinstance(value, dict):
        raise error(f"'{file}': must hold a JSON object, holds a {type(value).__name__}.")
    return value


def read_config(file: Path) -> dict[str, object]:
    """A model's `config.json`, in which transformers writes infinities as Python does; otherwise as `read_json`."""
    return read_json(file, most=MAX_CONFIG_BYTES, infinities=True)
