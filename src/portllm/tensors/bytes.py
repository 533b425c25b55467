"""What lies in a model's files: spans of bytes, headers, and JSON that nobody vouches for. No arithmetic.

The network is touched for a file of the hub only.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from portllm.errors import CheckpointError, InputChangedError
from portllm.files.input_file import open_unchanged
from portllm.files.source import LocalFile, RemoteFile
from portllm.tensors.info import TensorInfo

_BATCH = 512

MOST_PIECES = 1024
"""Pieces of memory that one call of the kernel fills (IOV_MAX)."""


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of one tensor, counted from its first byte.

    Raises:
        CheckpointError: The file is gone or became shorter since it was opened.
        RemoteError: A file on a server cannot be read.
    """
    stop = info.n_bytes if stop is None else stop
    if isinstance(info.file, RemoteFile):
        from portllm.tensors.ranges import read_range  # loads an HTTP client, which few runs need

        return read_range(info.file, info.start + start, info.start + stop)
    return next(_read_local([(info, start, stop)]))


def _read_local(spans: Iterable[tuple[TensorInfo, int, int]]) -> Iterator[bytes]:
    """Spans of one file on this disk, which is opened once."""
    spans = list(spans)
    info = spans[0][0]
    with _opened(info) as file:
        for info, start, stop in spans:
            yield _read_span(file, info, start, stop)


@contextmanager
def _opened(info: TensorInfo) -> Iterator[int]:
    """The descriptor of the file on this disk that holds a tensor."""
    if not isinstance(info.file, LocalFile):
        raise TypeError(f"'{info.name}': '{info.file}' is not on this disk")
    try:
        file = open_unchanged(info.file)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.") from error


def _read_span(file: int, info: TensorInfo, start: int, stop: int) -> bytes:
    data = os.pread(file, stop - start, info.start + start)
    while len(data) < stop - start:  # one call returns at most 2 GiB, and may return less
        more = os.pread(file, stop - start - len(data), info.start + start + len(data))
        if not more:
            raise InputChangedError(
                f"'{info.name}': '{info.file}' ended at {len(data)} of {stop - start} bytes; "
                "it changed while it was read. Run again when nothing writes to it."
            )
        data += more
    return data


def read_into(spans: Iterable[tuple[TensorInfo, memoryview]]) -> None:
    """Fill memory with whole tensors of one file on this disk; those that follow each other are read by one call.

    Errors as `read_bytes`.
    """
    runs: list[list[tuple[TensorInfo, memoryview]]] = []
    for info, memory in sorted((span for span in spans if len(span[1])), key=lambda span: span[0].start):
        if not runs or runs[-1][-1][0].stop != info.start:
            runs.append([])
        runs[-1].append((info, memory))
    if not runs:
        return
    with _opened(runs[0][0][0]) as file:
        for run in runs:
            _fill(file, run)


def _fill(file: int, run: Sequence[tuple[TensorInfo, memoryview]]) -> None:
    place, waiting = run[0][0].start, [memory for _, memory in run]
    while waiting:  # one call reads at most 2 GiB, and may read less
        count = os.preadv(file, waiting[:MOST_PIECES], place)
        place += count
        if not count:
            info = next(info for info, _ in run if place < info.stop)
            raise InputChangedError(
                f"'{info.name}': '{info.file}' became shorter while it was read. Run again when nothing writes to it."
            )
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.pop(0))
        if count:
            waiting[0] = waiting[0][count:]


def read_spans(spans: Sequence[tuple[TensorInfo, int, int]]) -> Iterator[bytes]:
    """What `read_bytes` gives for each tensor, start and stop, in order; slices of remote files are read side by side.

    Errors as `read_bytes`.
    """
    for first in range(0, len(spans), _BATCH):
        batch = spans[first : first + _BATCH]
        if any(isinstance(info.file, RemoteFile) for info, _, _ in batch):
            from portllm.tensors.ranges import concurrently

            yield from concurrently(lambda span: read_bytes(*span), batch)
        else:
            for _, spans_of_file in groupby(batch, key=lambda span: span[0].file):
                yield from _read_local(spans_of_file)
