"""What bitsandbytes makes of 16-bit weights when it loads them in 4 bit: quantized and dequantized again. Pure.

A block of elements shares one scale, its largest magnitude s. Each element becomes the nearest s·c, for c one of the
16 values of a code. With double quantization the scales are quantized too: their mean is taken off, and 256 of them
share a scale and become the nearest of 256 values.

Sources: NF4 and double quantization, QLoRA (arXiv 2305.14314, section 3 and appendix E); the values of FP4 and of the
8-bit code, bitsandbytes' `functional.py` (`get_4bit_type`, `create_dynamic_map`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from portllm.arrays import Float32, Int64

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256

CELLS = 1 << 11
"""Cells of the range from -1 to 1; narrower than any two borders between values of a code lie apart."""

CODES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sorted({sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 2, 3, 4, 6, 8, 12)})),
}  # fmt: skip
"""The values that an element of a block with the scale 1 can have, in order; FP4 has zero twice."""


@dataclass(frozen=True, slots=True)
class FourBitScheme:
    """A way to load weights in 4 bit.

    Attributes:
        kind: A key of `CODES`.
        is_double: Whether the scales are quantized too (`bnb_4bit_use_double_quant`).
    """

    kind: str
    is_double: bool = False

    def __str__(self) -> str:
        return self.kind + ("-double" if self.is_double else "")


SCHEMES: Mapping[str, FourBitScheme] = {
    str(scheme): scheme for kind in CODES for scheme in (FourBitScheme(kind), FourBitScheme(kind, is_double=True))
}
"""Every scheme by its name: `nf4`, `nf4-double`, `fp4`, `fp4-double`."""


def block_scales(values: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " blocks"]:
    """The largest magnitude of each block of 64; the last block may be shorter.

    Example:
        >>> block_scales(np.array([1.0] * 64 + [-3.0, 2.0], np.float32)).tolist()
        [1.0, 3.0]
    """
    if not len(values):
        return np.empty(0, np.float32)
    return np.maximum.reduceat(np.abs(values), np.arange(0, len(values), BLOCK_SIZE))


def stored_scales(scales: Float32[np.ndarray, " blocks"], scheme: FourBitScheme) -> Float32[np.ndarray, " blocks"]:
    """What dequantizing makes of the scales of a whole tensor."""
    if not scheme.is_double or not len(scales):
        return scales
    offset = scales.mean(dtype=np.float32)
    rest = scales - offset
    groups = np.maximum.reduceat(np.abs(rest), np.arange(0, len(rest), NESTED_BLOCK_SIZE))
    groups = np.repeat(groups, NESTED_BLOCK_SIZE)[: len(rest)]
    nearest: Float32[np.ndarray, " blocks"] = _nearest(_over(rest, groups), _dynamic_code()) * groups + offset
    return nearest


def requantized(
    values: Float32[np.ndarray, " n"],
    scales: Float32[np.ndarray, " blocks"],
    stored: Float32[np.ndarray, " blocks"],
    scheme: FourBitScheme,
) -> Float32[np.ndarray, " n"]:
    """What dequantizing makes of elements that begin at a block, before it is rounded to the dtype of the weights.

    Args:
        values: The elements.
        scales: Of their blocks, as `block_scales` gives them.
        stored: The same blocks' part of what `stored_scales` gives for the whole tensor.
        scheme: How they are quantized.

    Example:
        >>> values = np.array([0.5, -2.0, 0.1, 1.9], np.float32)
        >>> scales = block_scales(values)
        >>> requantized(values, scales, scales, SCHEMES["nf4"]).round(3).tolist()
        [0.492..., -2.0, 0.158..., 2.0]
    """
    per_element = (np.repeat(part, BLOCK_SIZE)[: len(values)] for part in (scales, stored))
    exact: Float32[np.ndarray, " n"] = _nearest_of_16(_over(values, next(per_element)), scheme.kind)
    exact *= next(per_element)
    return exact


def _over(values: Float32[np.ndarray, " n"], scales: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    """The values in units of their scales; multiplied by the inverse, as bitsandbytes does."""
    inverse = np.float32(1) / np.maximum(scales, np.float32(1e-38))
    scaled: Float32[np.ndarray, " n"] = np.clip(values * inverse, -1, 1)
    return scaled


def _nearest(values: Float32[np.ndarray, " n"], code: Float32[np.ndarray, " m"]) -> Float32[np.ndarray, " n"]:
    nearest: Float32[np.ndarray, " n"] = code[np.searchsorted((code[:-1] + code[1:]) / 2, values)]
    return nearest


def _nearest_of_16(values: Float32[np.ndarray, " n"], kind: str) -> Float32[np.ndarray, " n"]:
    """As `_nearest`, for a code of a few values: a cell holds one border at most, so that one comparison is enough."""
    code, borders, below = _cells(kind)
    cells = ((values + np.float32(1)) * np.float32(CELLS / 2)).astype(np.intp)
    nearest: Float32[np.ndarray, " n"] = code.take(below.take(cells) + (values > borders.take(cells)))
    return nearest


@cache
def _cells(kind: str) -> tuple[Float32[np.ndarray, " m"], Float32[np.ndarray, " cells"], Int64[np.ndarray, " cells"]]:
    """A code, and for each cell of the range from -1 to 1 the border in it and how many are below."""
    code = np.array(CODES[kind], np.float32)
    middles = (code[:-1] + code[1:]) / 2
    edges = np.arange(CELLS + 1) / (CELLS / 2) - 1
    below = np.searchsorted(middles, edges)
    borders = np.append(middles, np.float32(np.inf))[below]
    return code, borders, below


@cache
def _dynamic_code() -> Float32[np.ndarray, " 256"]:
    """The 256 values of a scale: a sign, a power of ten, and as many fractions as there are bits left."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1, 2**power + 1, dtype=np.float32)
        means = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (power - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, np.float32))
