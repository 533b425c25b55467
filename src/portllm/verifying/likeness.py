"""How a merged tensor compares with what a merge makes of it: sums over its elements, and what they say. Pure numpy."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

import numpy as np

from portllm.arrays import Float32, Float64
from portllm.tensors.rounding import round_to

ULPS = 2
"""Of the storage dtype: one for rounding the sum, one for rounding the delta first, as PEFT does in 16 bit."""

DELTA_ERROR = 2.0**-5
"""Of the size of the change: factors that were cast to bfloat16, and a product that was rounded and then scaled."""

GAIN_ERROR = 0.02
"""Of the patch's own size: rounding errors of single elements cancel, a wrong scale does not."""

DEVIATIONS = 3
"""How far the errors of single elements may add up by chance: `<R, C>` of independent ones is normal, `|R·C|` wide."""

MOST_CHANCE = 0.5
"""Of the patch's own size: where chance could come to more, nothing is said."""

SCALED_REST = 0.05
"""Of the size of a change: below it, what is there is the patch at another scale."""

BLOCK = 32
"""Elements of the smallest blocks of GGUF files, of which the larger ones consist."""

_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}


class Extent(StrEnum):
    """How far something holds a patch."""

    EXACTLY = "exactly"
    TO_ROUNDING = "to rounding"
    PARTLY = "partly"
    NOT = "not"


@dataclass(slots=True)
class _Sums:
    """Of one way to round: `C` is what the merge changes, `M` what was changed, `R` their difference."""

    change_sq: float = 0.0
    common: float = 0.0
    rest_sq: float = 0.0
    chance_sq: float = 0.0
    allowed_sq: float = 0.0
    is_near: bool = True

    def add(
        self, merged: np.ndarray, made: np.ndarray, base: np.ndarray, ulp: np.ndarray, *, is_quantized: bool = False
    ) -> None:
        """Take in some elements; single ones of a quantized tensor may be clipped, and only sums of them count."""
        change, rest = made - base, merged - made
        self.change_sq += float(change @ change)
        self.common += float((merged - base) @ change)
        self.rest_sq += float(rest @ rest)
        self.chance_sq += float((rest * change) @ (rest * change))
        self.allowed_sq += float(ulp @ ulp)
        largest = float(np.abs(change).max(initial=0.0))
        self.is_near &= is_quantized or bool((np.abs(rest) <= ULPS * ulp + 2 * DELTA_ERROR * largest).all())

    @property
    def gain(self) -> float | None:
        """`<M, C> / |C|²`: how often the change is in what was found; None where there is none."""
        return self.common / self.change_sq if self.change_sq else None

    @property
    def chance(self) -> float:
        """How far chance alone could move the gain."""
        return DEVIATIONS * math.sqrt(self.chance_sq) / self.change_sq if self.change_sq else 0.0

    @property
    def holds(self) -> bool:
        """Whether what was found is the change, but for rounding."""
        missing = abs(self.common - self.change_sq)
        is_whole = missing <= GAIN_ERROR * self.change_sq + DEVIATIONS * math.sqrt(self.chance_sq)
        within = self.rest_sq <= ULPS**2 * self.allowed_sq + DELTA_ERROR**2 * self.change_sq
        return self.is_near and within and is_whole


@dataclass(slots=True)
class Likeness:
    """How a tensor that a tool has merged compares with the base's and with ours; filled block by block.

    Attributes:
        dtype: The one that it is stored in.
        base_dtype: That of the base; a merge may have been rounded to it before it was stored in a wider one.
        is_same: Whether every element so far is the one that a merge makes.
        is_base: Whether every element so far is the base's.
        is_quantized: Whether it is stored in blocks of a few bits a value.
    """

    dtype: str
    base_dtype: str
    is_same: bool = True
    is_base: bool = True
    is_quantized: bool = False
    _rounded: _Sums = field(default_factory=_Sums)
    _rounded_twice: _Sums = field(default_factory=_Sums)
    _moved_sq: float = 0.0

    def add_quantized(
        self,
        merged: Float32[np.ndarray, " n"],
        made: Float32[np.ndarray, " n"],
        base: Float32[np.ndarray, " n"],
        *,
        bits: int,
    ) -> None:
        """Take in some elements that are stored in blocks of a few `bits` a value; see `add`."""
        self.is_same &= np.array_equal(merged, made)
        self.is_base, self.is_quantized = False, True
        wide, exact, stored = (values.astype(np.float64) for values in (merged, made, base))
        moved = wide - stored
        self._moved_sq += float(moved @ moved)
        self._rounded.add(wide, exact, stored, steps(merged, bits), is_quantized=True)

    def add(
        self, merged: Float32[np.ndarray, " n"], made: Float32[np.ndarray, " n"], base: Float32[np.ndarray, " n"]
    ) -> None:
        """Take in some elements: as they were found, as a merge makes them, and as the base has them."""
        base = round_to(base, self.dtype)
        self.is_same &= np.array_equal(merged, made)
        self.is_base &= np.array_equal(merged, base)
        wide, stored = merged.astype(np.float64), base.astype(np.float64)
        moved = wide - stored
        self._moved_sq += float(moved @ moved)
        self._rounded.add(wide, made.astype(np.float64), stored, ulps(np.maximum(abs(made), abs(base)), self.dtype))
        if self._is_wider:
            twice = round_to(made, self.base_dtype)
            self._rounded_twice.add(
                wide, twice.astype(np.float64), stored, ulps(np.maximum(abs(twice), abs(base)), self.base_dtype)
            )

    @property
    def _is_wider(self) -> bool:
        return _MANTISSA_BITS[self.dtype] > _MANTISSA_BITS[self.base_dtype]

    @property
    def is_hidden(self) -> bool:
        """Whether blocks of few bits are so coarse that chance alone could make half a patch of nothing."""
        return self.is_quantized and not self.is_same and self._rounded.chance > MOST_CHANCE

    @property
    def extent(self) -> Extent:
        """Whether it holds the change."""
        if self.is_same:
            return Extent.EXACTLY
        holds = self._rounded.holds or (self._is_wider and not self.is_quantized and self._rounded_twice.holds)
        return Extent.TO_ROUNDING if holds else Extent.NOT

    @property
    def finding(self) -> str:
        """What it is, for one that does not hold the change."""
        if self.is_base:
            return "as in the base: the patch is not in it"
        gain = self._rounded.gain
        rounding_sq = ULPS**2 * self._rounded.allowed_sq if self.is_quantized else 0.0
        if gain is not None and abs(gain) > GAIN_ERROR + self._rounded.chance:
            rest_sq = self._moved_sq - gain * self._rounded.common
            if rest_sq <= max(SCALED_REST * self._moved_sq, rounding_sq):
                return f"holds {gain:.3g} times the patch"
            return f"holds {gain:.3g} times the patch, and other changes"
        if self._moved_sq <= rounding_sq:
            return "as in the base, but for rounding: the patch is not in it"
        return "changed, but not by the patch"


def ulps(values: Float32[np.ndarray, " n"], dtype: str) -> Float64[np.ndarray, " n"]:
    """The distance of each value to the next one that a dtype has, in float64.

    Example:
        >>> ulps(np.array([1.0, 3.0], np.float32), "BF16").tolist()
        [0.0078125, 0.015625]
    """
    _, exponents = np.frexp(values.astype(np.float64))
    least = {"F16": -14, "F64": -1022}.get(dtype, -126)
    return cast(np.ndarray, np.ldexp(1.0, np.maximum(exponents - 1, least) - _MANTISSA_BITS[dtype]))


def steps(values: Float32[np.ndarray, " n"], bits: int) -> Float64[np.ndarray, " n"]:
    """About how far apart the values are that a block of `bits` a value can have: its range over their number less one.

    Example:
        >>> steps(np.linspace(-1, 1, 32, dtype=np.float32), 2)[:2].round(3).tolist()
        [0.667, 0.667]
    """
    blocks = values.astype(np.float64).reshape(-1, BLOCK)
    spread = (blocks.max(axis=1) - blocks.min(axis=1)) / (2**bits - 1)
    return cast(np.ndarray, np.repeat(spread, BLOCK))
