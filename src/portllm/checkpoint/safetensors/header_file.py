"""The header of a safetensors file on disk."""

from pathlib import Path

from portllm.checkpoint.safetensors.header import Header, parse_header, parse_header_length
from portllm.errors import CheckpointError


def read_header(file: Path) -> Header:
    """The header of one safetensors file.

    Raises:
        HeaderError: It breaks a rule of the format.
        CheckpointError: The file cannot be read.
    """
    text, file_bytes = read_header_text(file)
    return parse_header(text, file=file, file_bytes=file_bytes)


def read_header_text(file: Path) -> tuple[bytes, int]:
    """The JSON part of one safetensors file's header, and the size of the file; errors as `read_header`."""
    try:
        file_bytes = file.stat().st_size
        with open(file, "rb") as stream:
            length = parse_header_length(stream.read(8), file=file, file_bytes=file_bytes)
            return stream.read(length), file_bytes
    except OSError as error:
        raise CheckpointError(f"'{file}': cannot be read: {error.strerror}.") from error
