"""Values as a storage dtype holds them. Pure numpy."""

import numpy as np

from portllm.arrays import Float32, UInt16

_QUIET_NAN = 0x7FC0
"""What PyTorch makes of every NaN that it rounds to bfloat16."""


def round_to_bfloat16(values: Float32[np.ndarray, "*shape"]) -> UInt16[np.ndarray, "*shape"]:
    """The bits of each value rounded to bfloat16, to nearest, ties to even; every NaN becomes one quiet NaN.

    bfloat16 is the upper half of a float32. Adding `0x7FFF + (lowest kept bit)` before the lower half is cut off
    carries into the upper half exactly when the value must be rounded up.

    Example:
        >>> [hex(bits) for bits in round_to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32))]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = _QUIET_NAN
    return rounded


def round_to(values: Float32[np.ndarray, "*shape"], dtype: str) -> Float32[np.ndarray, "*shape"]:
    """The values rounded to what F32, F16 or BF16 can hold, to nearest, ties to even."""
    match dtype:
        case "BF16":
            return (round_to_bfloat16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "F16":
            with np.errstate(over="ignore"):  # what does not fit becomes infinite, as in torch
                return values.astype(np.float16).astype(np.float32)
        case _:
            return values


def encode_floats(values: Float32[np.ndarray, " n"], dtype: str) -> bytes:
    """The bytes of the values as F64, F32, F16 or BF16, rounded to nearest, ties to even.

    Example:
        >>> encode_floats(np.array([1.0, 1.00390625], np.float32), "BF16").hex()
        '803f803f'
    """
    if dtype == "BF16":
        return round_to_bfloat16(np.ascontiguousarray(values)).astype("<u2").tobytes()
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, as in torch
        return values.astype(f"<f{int(dtype[1:]) // 8}").tobytes()
