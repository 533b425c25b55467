"""Bytes of tensors on disk, one span after the other, read into memory that is used again, the kernel reading ahead."""

import os
from types import TracebackType
from typing import TypeVar

import numpy as np

from portllm.errors import CheckpointError, InputChangedError
from portllm.files import page_cache
from portllm.files.input_file import open_unchanged
from portllm.files.source import LocalFile
from portllm.tensors.info import TensorInfo

Reader = TypeVar("Reader", bound="SpanReader")


class SpanReader:
    """Reads spans for one thread; what a call returned is overwritten by the next.

    Args:
        keep_cached: Leave in the kernel's cache what was read.
    """

    def __init__(self, *, keep_cached: bool = True) -> None:
        self._keep_cached = keep_cached
        self._memory = memoryview(b"")
        self._info: TensorInfo | None = None
        self._file = -1
        self._fetched = 0

    def span(self, info: TensorInfo, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of a tensor.

        Raises:
            CheckpointError: The file is gone or became shorter since it was opened.
        """
        if self._info is not info:
            self._turn_to(info)
        if stop > self._fetched - page_cache.STEP_BYTES // 2:
            page_cache.fetch(self._file, info.start + self._fetched, min(page_cache.STEP_BYTES, info.n_bytes))
            self._fetched += page_cache.STEP_BYTES
        if stop - start > len(self._memory):
            self._memory = self._allocate(stop - start)
        span = self._memory[: stop - start]
        self._fill(span, info, start)
        return span

    def _allocate(self, n_bytes: int) -> memoryview:
        return np.empty(n_bytes, np.uint8).data

    def _fill(self, memory: memoryview, info: TensorInfo, start: int) -> None:
        done = 0
        while done < len(memory):  # one call reads at most 2 GiB, and may read less
            try:
                count = os.preadv(self._file, [memory[done:]], info.start + start + done)
            except OSError as error:
                raise _unreadable(info, error) from error
            if not count:
                raise InputChangedError(
                    f"'{info.name}': '{info.file}' ended at {done} of {len(memory)} bytes; it changed while it was "
                    "read. Run again when nothing writes to it."
                )
            done += count

    def _turn_to(self, info: TensorInfo) -> None:
        self._close()
        if not isinstance(info.file, LocalFile):
            raise TypeError(f"'{info.name}': '{info.file}' is not on this disk")
        try:
            self._file = open_unchanged(info.file)
        except OSError as error:
            raise _unreadable(info, error) from error
        self._info, self._fetched = info, 0

    def _close(self) -> None:
        if self._info is None:
            return
        if not self._keep_cached:
            page_cache.release(self._file, self._info.start, self._info.n_bytes)
        os.close(self._file)
        self._info = None

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _unreadable(info: TensorInfo, error: OSError) -> CheckpointError:
    return CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.")
