"""The header of a safetensors file on disk."""

from collections.abc import Iterable
from pathlib import Path

from portllm.checkpoint.safetensors.header import Header, parse_header, parse_header_length
from portllm.errors import CheckpointError
from portllm.files.input_file import local_file, open_input, state_of
from portllm.files.source import LocalFile


def read_header(file: Path, *, described_by: Iterable[LocalFile] = ()) -> Header:
    """The header of one safetensors file.

    Args:
        file: Where it is.
        described_by: The small files that say what its tensors are.

    Raises:
        HeaderError: It breaks a rule of the format.
        CheckpointError: The file cannot be read.
    """
    text, source = read_header_text(file, described_by=described_by)
    return parse_header(text, file=source, file_bytes=size_of(source))


def read_header_text(file: Path, *, described_by: Iterable[LocalFile] = ()) -> tuple[bytes, LocalFile]:
    """The JSON part of one safetensors file's header, and the file as it was then; otherwise as `read_header`."""
    try:
        with open_input(file) as stream:
            source = LocalFile(file, state_of(stream.fileno()), tuple(described_by))
            length = parse_header_length(stream.read(8), file=source, file_bytes=size_of(source))
            return stream.read(length), source
    except OSError as error:
        raise CheckpointError(f"'{file}': cannot be read: {error.strerror}.") from error


def describing(files: Iterable[Path]) -> tuple[LocalFile, ...]:
    """The small files that say what tensors are, as they are now; they are read after this.

    Raises:
        CheckpointError: One of them is not there.
    """
    found = []
    for file in files:
        try:
            found.append(local_file(file))
        except OSError as error:
            raise CheckpointError(f"'{file}': cannot be read: {error.strerror}.") from error
    return tuple(found)


def size_of(file: LocalFile) -> int:
    """The bytes that a file had when it was opened."""
    assert file.state is not None
    return file.state.size
