"""Rows of tensors on disk, one block after the other, read into memory that is used again."""

import torch
from torch import Tensor

from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.spans import SpanReader
from portllm.tensors.tensors import load_rows, torch_dtype


class RowReader(SpanReader):
    """Reads rows for one thread; what a call returned is overwritten by the next.

    Args:
        pinned: Keep the memory where a GPU can fetch it by itself.
        keep_cached: Leave in the kernel's cache what was read.
    """

    def __init__(self, *, pinned: bool = False, keep_cached: bool = True) -> None:
        super().__init__(keep_cached=keep_cached)
        self._pinned = pinned

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
        span = self.span(info, start * row_bytes, stop * row_bytes)
        if not span:
            return torch.empty(shape, dtype=torch_dtype(info.dtype))
        return torch.frombuffer(span, dtype=torch_dtype(info.dtype)).reshape(shape)

    def _allocate(self, n_bytes: int) -> memoryview:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned).numpy().data
