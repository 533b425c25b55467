"""The values that lie in a tensor's fingerprint window, as numbers: enough for an estimate, without torch."""

import numpy as np
from jaxtyping import Float32

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.identity import sample_window
from portllm.checkpoint.reader import read_bytes
from portllm.errors import UnsupportedDtypeError


def sample_values(info: TensorInfo) -> Float32[np.ndarray, " n"]:
    """The window's values in float32.

    Raises:
        UnsupportedDtypeError: The tensor does not hold floating-point numbers of 16, 32 or 64 bits.
    """
    return decode_floats(read_bytes(info, *sample_window(info.name, info.n_bytes)), info.dtype)


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
