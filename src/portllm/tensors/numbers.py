"""Bytes as numbers: the dtypes of headers, and codes of a few bits packed side by side. Pure numpy.

Sources: the OCP specifications of 8-bit floating point (E4M3 as PyTorch's `float8_e4m3fn`, without infinities) and of
microscaling formats (E2M1, E8M0).
"""

from collections.abc import Mapping

import numpy as np

from portllm.arrays import Float32, UInt8
from portllm.errors import UnsupportedDtypeError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What half a byte means in FP4."""


def _e4m3() -> Float32[np.ndarray, " 256"]:
    """What a byte means in E4M3: a sign, four bits of exponent with bias 7, three of mantissa. All ones: no number."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    size[(codes & 127) == 127] = np.nan
    values: Float32[np.ndarray, " 256"] = np.where(codes < 128, size, -size).astype(np.float32)
    return values


def _e8m0() -> Float32[np.ndarray, " 256"]:
    """What a byte means in E8M0: a power of two with bias 127; all ones is no number."""
    values = np.ldexp(np.float32(1), np.arange(256) - 127, dtype=np.float32)
    values[255] = np.nan
    return values


with np.errstate(over="ignore"):  # the last power of E8M0 is no number of float32
    BYTES: Mapping[str, Float32[np.ndarray, " 256"]] = {
        "F8_E4M3": _e4m3(),
        "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
        "F8_E8M0": _e8m0(),
        "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
        "U8": np.arange(256, dtype=np.float32),
    }
"""What a byte means, by dtype."""


def decode_floats(data: bytes | memoryview, dtype: str) -> Float32[np.ndarray, " n"]:
    """Bytes of a checkpoint as float32 numbers.

    Example:
        >>> decode_floats(bytes.fromhex("803f0040"), "BF16").tolist()
        [1.0, 2.0]
    """
    match dtype:
        case "BF16":  # the upper half of a float32
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        case "F16" | "F32" | "F64":
            return np.frombuffer(data, f"<f{int(dtype[1:]) // 8}").astype(np.float32, copy=False)
        case _:
            raise UnsupportedDtypeError(f"dtype {dtype}: cannot be sampled as numbers.")


def decode_numbers(data: bytes, dtype: str) -> Float32[np.ndarray, " n"]:
    """As `decode_floats`, also for numbers of one byte and for codes of FP4, which are bytes already.

    Example:
        >>> decode_numbers(bytes([0x38, 0x7E, 0x81]), "F8_E4M3").tolist()
        [1.0, 448.0, -0.001953125]
    """
    if dtype in BYTES:
        return BYTES[dtype][np.frombuffer(data, np.uint8)]
    return decode_floats(data, dtype)


def unpack(packed: UInt8[np.ndarray, "rows bytes"], bits: int) -> UInt8[np.ndarray, "rows n"]:
    """Codes of a few bits that lie in each row one after the other, the first one lowest; 32 fill so many words.

    Example:
        >>> unpack(np.array([[0x21, 0x43]], np.uint8), 4).tolist()
        [[1, 2, 3, 4]]
        >>> unpack(np.array([[0b10_001_000, 0b1]], np.uint8), 3)[:, :3].tolist()
        [[0, 1, 6]]
    """
    if bits == 8:
        return packed
    if bits == 4:
        return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    apart = np.unpackbits(packed, axis=1, bitorder="little")
    whole = apart[:, : apart.shape[1] // bits * bits].reshape(len(packed), -1, bits)
    values: UInt8[np.ndarray, "rows n"] = (whole << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return values


def unpack_nibbles(packed: UInt8[np.ndarray, " n"]) -> UInt8[np.ndarray, " m"]:
    """The halves of each byte, the upper one first.

    Example:
        >>> unpack_nibbles(np.array([0x1F, 0x20], np.uint8)).tolist()
        [1, 15, 2, 0]
    """
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
