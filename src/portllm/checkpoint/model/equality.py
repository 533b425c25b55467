"""Do two stored tensors hold the same numbers? All of them on disk; on a server, as far as samples tell."""

from functools import lru_cache

import numpy as np

from portllm.checkpoint.reading.bytes import read_bytes, read_spans
from portllm.checkpoint.reading.decoding import decode_floats
from portllm.checkpoint.tensor.info import TensorInfo, n_bytes_of
from portllm.files.source import RemoteFile

BLOCK_ELEMENTS = 1 << 23
WINDOWS = 16
WINDOW_ELEMENTS = 4096
WIDENED = ("BF16", "F16", "F32")
"""Dtypes whose numbers are compared where they are not stored in the same one: float32 holds each of them."""


def same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two tensors are stored alike and equal, byte for byte."""
    return _stored_alike(left, right) and _all_equal(left, right)


def same_values(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers; a float32 copy of a bfloat16 tensor does.

    Tensors on disk are compared whole, once for each version of their files. Of tensors on a server windows are
    compared that lie evenly over the whole of them.
    """
    widened = left.encoding is None is right.encoding and left.dtype in WIDENED and right.dtype in WIDENED
    if not (_stored_alike(left, right) or (widened and left.shape == right.shape)):
        return False
    return _compared(left, right)


def _stored_alike(left: TensorInfo, right: TensorInfo) -> bool:
    kinds = ((info.stored_as, info.shape, info.encoding, info.n_bytes) for info in (left, right))
    if next(kinds) != next(kinds) or len(left.parts) != len(right.parts):
        return False
    return all(
        mine[0] == theirs[0] and same_bytes(mine[1], theirs[1])
        for mine, theirs in zip(left.parts, right.parts, strict=True)
    )


@lru_cache(maxsize=256)
def _compared(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether both are equal; many parts of one run ask, and it is remembered for the files in the state they have."""
    is_remote = any(isinstance(info.file, RemoteFile) for info in (left, right))
    return _windows_equal(left, right) if is_remote else _all_equal(left, right)


def _all_equal(left: TensorInfo, right: TensorInfo) -> bool:
    size = left.n_params if left.encoding is None else left.n_bytes
    spans = ((start, min(start + BLOCK_ELEMENTS, size)) for start in range(0, size, BLOCK_ELEMENTS))
    return all(
        _numbers_equal(read_bytes(left, *_places(left, *span)), left, read_bytes(right, *_places(right, *span)), right)
        for span in spans
    )


def _windows_equal(left: TensorInfo, right: TensorInfo) -> bool:
    size = left.n_params if left.encoding is None else left.n_bytes
    last = max(0, size - WINDOW_ELEMENTS)
    starts = sorted({last * number // (WINDOWS - 1) for number in range(WINDOWS)})
    spans = [(start, min(start + WINDOW_ELEMENTS, size)) for start in starts]
    parts = read_spans([(info, *_places(info, *span)) for span in spans for info in (left, right)])
    return all(_numbers_equal(mine, left, theirs, right) for mine, theirs in zip(parts, parts, strict=True))


def _places(info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    """Which bytes hold some elements; of an encoded tensor, bytes themselves are counted."""
    if info.encoding is not None:
        return start, stop
    return n_bytes_of(info.dtype, (start,)), n_bytes_of(info.dtype, (stop,))


def _numbers_equal(mine: bytes, left: TensorInfo, theirs: bytes, right: TensorInfo) -> bool:
    if left.dtype == right.dtype:
        return mine == theirs
    return np.array_equal(decode_floats(mine, left.dtype), decode_floats(theirs, right.dtype))
