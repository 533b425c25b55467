"""A file that somebody else wrote: opened without waiting for anybody, and seen to stay as it is while it is read.

A pipe or a device can be waited for forever, so that only regular files are read. What is written from files that
somebody changes meanwhile would be a mixture of old and new: `require_unchanged` is asked before an output takes its
name.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO

from portllm.errors import InputChangedError
from portllm.files.source import FileState, LocalFile, Source

MAX_BYTES = 1 << 30
"""Of a file that is read whole."""


def open_input(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading.

    Raises:
        OSError: It is none, or cannot be opened; also for what can be no name.
    """
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: str | Path) -> int:
    """The descriptor of a regular file; errors as `open_input`."""
    try:
        # Without O_NONBLOCK the opening of a pipe waits for somebody to write into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except ValueError as error:
        raise OSError(errno.EINVAL, "no file can have such a name", str(path)) from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_input(path: str | Path, *, most: int = MAX_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: As `open_input`; or it has more than `most` bytes.
    """
    with open_input(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(min(size, most) + 1)  # as much room is made as is asked for
    if len(data) > most:
        raise OSError(errno.EFBIG, f"has {size} bytes; the limit is {most}", str(path))
    return data


def state_of(descriptor: int) -> FileState:
    """The state of an open file."""
    return _state(os.fstat(descriptor))


def local_file(path: Path, *, described_by: Iterable[LocalFile] = ()) -> LocalFile:
    """A file as it is now.

    Raises:
        OSError: It is not there.
    """
    return LocalFile(path, _state(path.stat()), tuple(described_by))


def open_unchanged(file: LocalFile) -> int:
    """A descriptor of a file that is as it was when it was first opened.

    Raises:
        InputChangedError: It is not.
        OSError: It cannot be opened.
    """
    descriptor = open_descriptor(file.path)
    if file.state is not None and state_of(descriptor) != file.state:
        os.close(descriptor)
        raise _changed(file)
    return descriptor


def require_unchanged(files: Iterable[Source]) -> None:
    """See to it that files, and those that describe them, are as they were when they were first opened.

    Files of the hub are read at one commit, and cannot change.

    Raises:
        InputChangedError: One is not.
    """
    local = {part for file in files if isinstance(file, LocalFile) for part in (file, *file.described_by)}
    for file in sorted(local):
        if file.state is not None and file.state != _state_now(file.path):
            raise _changed(file)


def require_in_place(files: Iterable[Source]) -> None:
    """See to it that files which this program writes to are still those that were opened, as large as they were.

    Raises:
        InputChangedError: One was replaced, cut or removed.
    """
    for file in files:
        if isinstance(file, LocalFile) and file.state is not None:
            now = _state_now(file.path)
            if now is None or astuple(now)[:3] != astuple(file.state)[:3]:
                raise InputChangedError(
                    f"'{file}': was replaced, truncated or removed while it was being written, and was left as it "
                    "is. Restore the file, then run again."
                )


@contextmanager
def unchanged(files: Iterable[Source]) -> Iterator[None]:
    """A block that reads files: what it finds is worth nothing where one of them changes meanwhile.

    Raises:
        InputChangedError: As `require_unchanged`, at the end of the block.
    """
    read = tuple(files)
    yield
    require_unchanged(read)


def _state(facts: os.stat_result) -> FileState:
    return FileState(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns)


def _state_now(path: Path) -> FileState | None:
    try:
        return _state(path.stat())
    except OSError:
        return None


def _changed(file: LocalFile) -> InputChangedError:
    return InputChangedError(
        f"'{file}': changed while it was being read, so the result may be neither the old file nor the new one. "
        "Run again when nothing writes to it."
    )
