"""Some of a tensor's values as numbers, such as those in its fingerprint's window: for estimates, without torch."""

from collections.abc import Iterator, Sequence

import numpy as np
from blake3 import blake3

from portllm.arrays import Float32
from portllm.tensors.bytes import read_spans
from portllm.tensors.decoding import decoded, spans_of
from portllm.tensors.info import DTYPE_BITS, TensorInfo, n_bytes_of

SAMPLE_BYTES = 4096
"""Bytes of each tensor that the fingerprint reads; a smaller tensor is read whole."""


def sample_span(info: TensorInfo) -> tuple[int, int]:
    """Which elements of a tensor lie in its fingerprint's window; of an encoded one, in that of its values.

    Example:
        >>> from pathlib import Path
        >>> from portllm.files.source import LocalFile
        >>> sample_span(TensorInfo("w", "BF16", (3, 5), LocalFile(Path("m.safetensors")), 8, 38))
        (0, 15)
    """
    start, stop = sample_window(info.name, n_bytes_of(info.dtype, info.shape))
    width = DTYPE_BITS[info.dtype] // 8
    return start // width, stop // width


def load_values(info: TensorInfo, start: int, stop: int) -> Float32[np.ndarray, " n"]:
    """Elements `start` to `stop` of a tensor in row-major order, in float32.

    Raises:
        UnsupportedDtypeError: The tensor does not hold floating-point numbers of 16, 32 or 64 bits.
        CheckpointError: It cannot be read, or not be dequantized.
    """
    return next(load_spans([(info, start, stop)]))


def load_spans(spans: Sequence[tuple[TensorInfo, int, int]]) -> Iterator[Float32[np.ndarray, " n"]]:
    """What `load_values` gives for each tensor, start and stop, in order; remote files are read side by side."""
    places = [spans_of(*span) for span in spans]
    data = read_spans([place for needed in places for place in needed])
    for span, needed in zip(spans, places, strict=True):
        yield decoded(*span, [next(data) for _ in needed])


def sample_window(name: str, n_bytes: int) -> tuple[int, int]:
    """Which bytes of a tensor the fingerprint reads: a window at a place drawn from the tensor's name.

    Example:
        >>> sample_window("model.norm.weight", 1152)
        (0, 1152)
        >>> start, stop = sample_window("lm_head.weight", 1_000_000)
        >>> stop - start, start % 8
        (4096, 0)
    """
    if n_bytes <= SAMPLE_BYTES:
        return 0, n_bytes
    draw = int.from_bytes(blake3(f"portllm sample 1\0{name}".encode()).digest(8), "little")
    start = draw % (n_bytes - SAMPLE_BYTES + 1) // 8 * 8
    return start, start + SAMPLE_BYTES


def runs(wanted: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Places in a list between which its numbers count up by one.

    Example:
        >>> list(runs([4, 5, 6, -1, 0, 1]))
        [(0, 3), (3, 4), (4, 6)]
    """
    first = 0
    for place in range(1, len(wanted) + 1):
        if place == len(wanted) or wanted[place] != wanted[place - 1] + 1 or wanted[place - 1] < 0:
            yield first, place
            first = place
