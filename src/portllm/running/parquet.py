"""Rows of a Parquet file: the only module that imports pyarrow."""

from collections.abc import Iterator
from pathlib import Path

from portllm.errors import DataError, MissingExtraError
from portllm.files.input_file import open_input

try:
    import pyarrow
    from pyarrow import parquet
except ImportError as missing:
    raise MissingExtraError(
        f"'{missing.name}': not installed; Parquet files need it. Run: pip install pyarrow"
    ) from missing

BATCH_ROWS = 1000


def parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    """The rows of a Parquet file, numbers as text, as the other readers leave them.

    Raises:
        DataError: The file is damaged.
        OSError: It cannot be read.
    """
    with open_input(path) as stream:
        try:
            for batch in parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    yield plain_row(row)
        except pyarrow.ArrowException as error:
            why = str(error).splitlines()[0]
            raise DataError(f"'{path}': is not a valid Parquet file: {why} Download it again.") from error


def plain_row(row: dict[str, object]) -> dict[str, object]:
    """A row of Arrow as it would be read from JSON with its numbers as text."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: object) -> object:
    """A value as it would be read from JSON; a field that a message lacks is none, not null."""
    match value:
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case None | bool() | str() | bytes():
            return value
        case _:
            return str(value)
