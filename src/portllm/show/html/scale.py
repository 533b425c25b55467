"""From numbers to places on a picture, and the round numbers that an axis names. Pure."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""What a step of an axis may be, times a power of ten."""

LONG = 200
"""Ratio of the ends of a logarithmic line from which powers of ten are enough."""

BEYOND = 0.02
"""How much of a step a number may lie beyond the end of an axis before there is another step for it."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A line between two numbers and two places; a number beyond its ends is put on the end.

    Attributes:
        low: The number at `start`.
        high: The number at `stop`; larger than `low`.
        start: A place.
        stop: Another.
        is_log: Whether equal distances are equal ratios; both numbers are positive then.
    """

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The place of a number.

        Example:
            >>> Scale(0.0, 2.0, 10.0, 20.0).at(1.0), Scale(0.0, 2.0, 10.0, 20.0).at(-math.inf)
            (15.0, 10.0)
            >>> Scale(0.01, 1.0, 0.0, 10.0, is_log=True).at(0.1)
            5.0
        """
        inside = min(max(value, self.low), self.high)
        low, high, here = (math.log(x) for x in (self.low, self.high, inside)) if self.is_log else (
            self.low, self.high, inside
        )  # fmt: skip
        return self.start + (self.stop - self.start) * (here - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers on the line, about four.

        Of a logarithmic one these are powers of ten, with twice and five times of each where it is short.

        Example:
            >>> Scale(0.0, 1.0, 0.0, 1.0).ticks(), Scale(0.3, 200.0, 0.0, 1.0, is_log=True).ticks()
            ([0.0, 0.25, 0.5, 0.75, 1.0], [1.0, 10.0, 100.0])
            >>> Scale(0.8, 6.0, 0.0, 1.0, is_log=True).ticks()
            [1.0, 2.0, 5.0]
        """
        if self.is_log:
            digits = (1, 2, 5) if self.high / self.low < LONG else (1,)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            numbers = [float(f"{digit}e{power}") for power in powers for digit in digits]
            return [number for number in numbers if self.low <= number <= self.high]
        step = round_step(self.high - self.low, 4)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def round_step(span: float, count: int = 4) -> float:
    """The smallest round step that cuts a span into at most `count` parts.

    Example:
        >>> round_step(1.0), round_step(7.3), round_step(0.05)
        (0.25, 2.0, 0.02)
    """
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(step * power for step in STEPS if step * power * count >= span * (1 - 1e-9))


def widened(values: Iterable[float], *held: float) -> tuple[float, float]:
    """Round ends between which all finite values lie, and those that are to be seen in any case.

    Example:
        >>> widened([0.83, 1.0001, math.inf], 0.0)
        (0.0, 1.0)
        >>> widened([])
        (0.0, 1.0)
    """
    found = [value for value in (*values, *held) if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if low == high:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    step = round_step(high - low)
    return math.floor(low / step + BEYOND) * step, math.ceil(high / step - BEYOND) * step
