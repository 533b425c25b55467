"""What lies in a model's files: spans of bytes, headers, and JSON that nobody vouches for. No arithmetic.

The network is touched for a file of the hub only.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import CheckpointError
from portllm.files.json_file import MAX_JSON_BYTES
from portllm.files.source import RemoteFile

MAX_JSON_VALUES = 6_000_000
"""Three times what the largest of them holds. A value takes some 200 bytes of Python's memory, however short it is."""

MAX_CONFIG_BYTES = 8_000_000
"""Of a configuration: the largest that are around, with thousands of labels or added tokens, have one or two."""

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
        from portllm.checkpoint.reading.ranges import read_range  # loads an HTTP client, which few runs need

        return read_range(info.file, info.start + start, info.start + stop)
    return next(_read_local([(info, start, stop)]))


def _read_local(spans: Iterable[tuple[TensorInfo, int, int]]) -> Iterator[bytes]:
    """Spans of one file on this disk, which is opened once."""
    spans = list(spans)
    info = spans[0][0]
    try:
        with open(str(info.file), "rb", buffering=0) as file:
            for info, start, stop in spans:
                yield _read_span(file.fileno(), info, start, stop)
    except OSError as error:
        raise CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.") from error


def _read_span(file: int, info: TensorInfo, start: int, stop: int) -> bytes:
    data = os.pread(file, stop - start, info.start + start)
    while len(data) < stop - start:  # one call returns at most 2 GiB, and may return less
        more = os.pread(file, stop - start - len(data), info.start + start + len(data))
        if not more:
            raise CheckpointError(
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
    info = runs[0][0][0]
    try:
        with open(str(info.file), "rb", buffering=0) as file:
            for run in runs:
                _fill(file.fileno(), run)
    except OSError as error:
        raise CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.") from error


def _fill(file: int, run: Sequence[tuple[TensorInfo, memoryview]]) -> None:
    place, waiting = run[0][0].start, [memory for _, memory in run]
    while waiting:  # one call reads at most 2 GiB, and may read less
        count = os.preadv(file, waiting[:MOST_PIECES], place)
        place += count
        if not count:
            info = next(info for info, _ in run if place < info.stop)
            raise CheckpointError(
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
            from portllm.checkpoint.reading.ranges import concurrently

            yield from concurrently(lambda span: read_bytes(*span), batch)
        else:
            for _, spans_of_file in groupby(batch, key=lambda span: span[0].file):
                yield from _read_local(spans_of_file)


def read_json_text(
    file: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError, most_bytes: int = MAX_JSON_BYTES
) -> bytes:
    """The content of a JSON file, which is not so large that what is made of it could fill a machine's memory.

    Raises:
        error: The file is none (a pipe could be waited for forever), cannot be read, or is too large.
    """
    try:
        if file.exists() and not file.is_file():
            raise error(f"'{file}': is not a file. Fetch or write it again.")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            text = stream.read(min(size, most_bytes) + 1)  # as much room is made as is asked for
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    if len(text) > most_bytes:
        raise error(f"'{file}': has {size} bytes; at most {most_bytes} are read.")
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise error(f"'{file}': holds more than {MAX_JSON_VALUES} values; no file of a model has so many.")
    return text
