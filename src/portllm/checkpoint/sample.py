"""Some of a tensor's values as numbers, such as those in its fingerprint's window: for estimates, without torch."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from portllm.checkpoint.decoding import decoded, spans_of
from portllm.checkpoint.header import DTYPE_BITS, TensorInfo, n_bytes_of
from portllm.checkpoint.identity import sample_window
from portllm.checkpoint.raw_files import read_spans


def sample_span(info: TensorInfo) -> tuple[int, int]:
    """Which elements of a tensor lie in its fingerprint's window; of an encoded one, in that of its values.

    Example:
        >>> from pathlib import Path
        >>> sample_span(TensorInfo("w", "BF16", (3, 5), Path("m.safetensors"), 8, 38))
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
