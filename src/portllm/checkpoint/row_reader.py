"""Rows of tensors on disk, one after the other, read into memory that is used again, with the kernel reading ahead."""

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from portllm.checkpoint import page_cache
from portllm.checkpoint.header import TensorInfo, n_bytes_of
from portllm.checkpoint.tensors import load_rows, torch_dtype
from portllm.errors import CheckpointError


class RowReader:
    """Reads rows for one thread; what a call returned is overwritten by the next.

    Args:
        pinned: Keep the memory where a GPU can fetch it by itself.
        keep_cached: Leave in the kernel's cache what was read.
    """

    def __init__(self, *, pinned: bool = False, keep_cached: bool = True) -> None:
        self._pinned, self._keep_cached = pinned, keep_cached
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._info: TensorInfo | None = None
        self._file = -1
        self._fetched = 0

    def rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, counted along its first axis; a scalar has one. Quantized ones: decoded.

        Raises:
            CheckpointError: The file is gone or became shorter since it was opened.
            UnsupportedDtypeError: torch has no such dtype.
        """
        if info.encoding is not None:
            return load_rows(info, start, stop)
        row_bytes = n_bytes_of(info.dtype, info.shape[1:])
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        return self.data(info, start * row_bytes, stop * row_bytes).view(torch_dtype(info.dtype)).reshape(shape)

    def data(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` of a tensor.

        Raises:
            CheckpointError: As `rows`.
        """
        if self._info is not info:
            self._turn_to(info)
        if stop > self._fetched - page_cache.STEP_BYTES // 2:
            page_cache.fetch(self._file, info.start + self._fetched, min(page_cache.STEP_BYTES, info.n_bytes))
            self._fetched += page_cache.STEP_BYTES
        if stop - start > self._memory.numel():
            self._memory = torch.empty(stop - start, dtype=torch.uint8, pin_memory=self._pinned)
        data = self._memory[: stop - start]
        self._fill(data.numpy().data, info, start)
        return data

    def _fill(self, memory: memoryview, info: TensorInfo, start: int) -> None:
        done = 0
        while done < len(memory):  # one call reads at most 2 GiB, and may read less
            try:
                count = os.preadv(self._file, [memory[done:]], info.start + start + done)
            except OSError as error:
                raise _unreadable(info, error) from error
            if not count:
                raise CheckpointError(
                    f"'{info.name}': '{info.file}' ended at {done} of {len(memory)} bytes; it changed while it was "
                    "read. Run again when nothing writes to it."
                )
            done += count

    def _turn_to(self, info: TensorInfo) -> None:
        self._close()
        if not isinstance(info.file, Path):
            raise TypeError(f"'{info.name}': '{info.file}' is not on this disk")
        try:
            self._file = os.open(info.file, os.O_RDONLY | os.O_CLOEXEC)
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

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _unreadable(info: TensorInfo, error: OSError) -> CheckpointError:
    return CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.")
