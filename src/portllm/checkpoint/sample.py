"""Some of a tensor's values as numbers, such as those in its fingerprint's window: for estimates, without torch."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32

from portllm.checkpoint.header import DTYPE_BITS, TensorInfo, n_bytes_of
from portllm.checkpoint.identity import sample_window
from portllm.checkpoint.reader import read_spans
from portllm.errors import UnsupportedDtypeError


def sample_span(info: TensorInfo) -> tuple[int, int]:
    """Which elements of a tensor lie in its fingerprint's window.

    Example:
        >>> from pathlib import Path
        >>> sample_span(TensorInfo("w", "BF16", (3, 5), Path("m.safetensors"), 8, 38))
        (0, 15)
    """
    start, stop = sample_window(info.name, info.n_bytes)
    width = DTYPE_BITS[info.dtype] // 8
    return start // width, stop // width


def load_values(info: TensorInfo, start: int, stop: int) -> Float32[np.ndarray, " n"]:
    """Elements `start` to `stop` of a tensor in row-major order, in float32.

    Raises:
        UnsupportedDtypeError: The tensor does not hold floating-point numbers of 16, 32 or 64 bits.
    """
    return next(load_spans([(info, start, stop)]))


def load_spans(spans: Sequence[tuple[TensorInfo, int, int]]) -> Iterator[Float32[np.ndarray, " n"]]:
    """What `load_values` gives for each tensor, start and stop, in order; remote files are read side by side."""
    places = [(info, n_bytes_of(info.dtype, (start,)), n_bytes_of(info.dtype, (stop,))) for info, start, stop in spans]
    for (info, _, _), data in zip(spans, read_spans(places), strict=True):
        yield decode_floats(data, info.dtype)


def decode_floats(data: bytes, dtype: str) -> Float32[np.ndarray, " n"]:
    """Bytes of a checkpoint as float32 numbers.

    Example:
        >>> decode_floats(bytes.fromhex("803f0040"), "BF16").tolist()
        [1.0, 2.0]
    """
    match dtype:
        case "BF16":  # the upper half of a float32
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        case "F16" | "F32" | "F64":
            return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32)
        case _:
            raise UnsupportedDtypeError(f"dtype {dtype}: holds no numbers that can be sampled.")
