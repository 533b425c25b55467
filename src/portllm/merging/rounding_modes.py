"""Rounding modes of a merge: to the nearest value, or stochastic with a seed."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Nearest:
    """Round to the nearest value, ties to even."""

    def __str__(self) -> str:
        return "nearest"


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Round up or down at random, so that the expected value is exact; bfloat16 only."""

    seed: int = 0

    def __str__(self) -> str:
        return f"stochastic-seed{self.seed}"


Rounding = Nearest | Stochastic

NEAREST = Nearest()
