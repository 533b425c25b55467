"""How far a served patch is from the patch: root mean squares of log-probabilities, in nats. Pure.

Everything is compared where the runtime says something: at its likeliest tokens after each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from portllm.proving.runtimes.contract import Answer

Values: TypeAlias = NDArray[np.float64]
Verdict: TypeAlias = Literal["proven", "no effect", "wrong", "unclear"]

NOISE_FACTOR = 2.0
"""How many times the noise of the bare base a right patch may be off; measured: 0.9 to 1.3."""

EFFECT_SHARE = 0.02
"""The share of its effect by which a right patch may be off where there is hardly noise: rounding of its factors to 16
bits is below half a percent, and one layer of thirty is 3 % or more."""

SEEN = 3.0
"""How many times the noise an effect must be to be judged."""

CERTAIN = 4.0
"""Standard errors from which a fault is told apart from the right patch."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a runtime says something.

    Attributes:
        rows: The prompt of each place, from 0.
        tokens: Its token.
        served: The log-probability that the runtime gives.
    """

    rows: NDArray[np.int64]
    tokens: NDArray[np.int64]
    served: Values

    def of(self, log_probs: NDArray[np.floating]) -> Values:
        """The log-probabilities (prompts, vocabulary) of a model here at the same places."""
        return np.asarray(log_probs[self.rows, self.tokens], dtype=np.float64)


def places(answers: Sequence[Answer]) -> Places:
    """Where the answers to prompts say something."""
    flat = [(row, token, value) for row, answer in enumerate(answers) for token, value in answer.top.items()]
    rows, tokens, served = zip(*flat, strict=True) if flat else ((), (), ())
    return Places(np.array(rows, np.int64), np.array(tokens, np.int64), np.array(served, np.float64))


def rms(difference: Values) -> float:
    """The root of the mean square.

    Example:
        >>> rms(np.array([3.0, -3.0]))
        3.0
    """
    return float(np.sqrt(np.mean(np.square(difference)))) if difference.size else 0.0


@dataclass(frozen=True, slots=True)
class Slope:
    """How much of a direction is in what was seen.

    Attributes:
        value: 1 for all of it, 0 for none.
        error: Its standard error, prompts being independent draws.
    """

    value: float
    error: float


def slope(seen: Values, direction: Values, rows: NDArray[np.int64]) -> Slope:
    """`<seen, direction> / |direction|^2`, least squares through zero, with an error that is robust to clusters.

    Example:
        >>> slope(np.array([2.0, 4.0]), np.array([1.0, 2.0]), np.array([0, 1]))
        Slope(value=2.0, error=0.0)
    """
    norm = float(direction @ direction)
    if not norm:
        return Slope(0.0, float("inf"))
    value = float(seen @ direction) / norm
    by_row = np.bincount(rows, weights=direction * (seen - value * direction))
    return Slope(value, float(np.sqrt(by_row @ by_row)) / norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the answers of a runtime come to against those here, in nats.

    Attributes:
        noise: How far the bare base is from the base here.
        effect: How far the patch here moves the base here.
        served_effect: How far the served patch moves the served base.
        error: How far the served patch is from the patch here.
        gain: How much of the effect arrives: 1 for all of it.
        null_errors: How far random patches of the same size are from the patch here.
    """

    noise: float
    effect: float
    served_effect: float
    error: float
    gain: Slope
    null_errors: tuple[float, ...]

    @property
    def tolerance(self) -> float:
        """How far a right patch may be off."""
        return max(NOISE_FACTOR * self.noise, EFFECT_SHARE * self.effect)

    @property
    def is_noisy(self) -> bool:
        """Whether it is the noise that limits what is seen."""
        return self.noise * NOISE_FACTOR > EFFECT_SHARE * self.effect

    @property
    def verdict(self) -> Verdict:
        """What follows, faults that hide in the noise apart."""
        if self.effect <= SEEN * self.noise:
            return "unclear"
        if self.error <= self.tolerance:
            return "proven"
        return "no effect" if self.served_effect <= self.tolerance else "wrong"


def measure(
    served_base: Sequence[Answer],
    served_patch: Sequence[Answer],
    *,
    base: NDArray[np.floating],
    patched: NDArray[np.floating],
    nulls: Sequence[NDArray[np.floating]],
) -> Measured:
    """Compare answers with log-probabilities (prompts, vocabulary) computed here.

    Args:
        served_base: What the runtime says with the bare base.
        served_patch: What it says with the patch.
        base: The base here.
        patched: The patch here.
        nulls: Random patches of the same size here.
    """
    bare, with_patch = places(served_base), places(served_patch)
    before, after = with_patch.of(base), with_patch.of(patched)
    moved = [
        value - served_base[row].top.get(token, known)
        for row, token, value, known in zip(
            with_patch.rows.tolist(), with_patch.tokens.tolist(), with_patch.served.tolist(), before.tolist(),
            strict=True,
        )
    ]  # fmt: skip
    return Measured(
        noise=rms(bare.served - bare.of(base)),
        effect=rms(after - before),
        served_effect=rms(np.array(moved)),
        error=rms(with_patch.served - after),
        gain=slope(with_patch.served - before, after - before, with_patch.rows),
        null_errors=tuple(rms(with_patch.of(null) - after) for null in nulls),
    )


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a fault explains what was seen.

    Attributes:
        error: How far the served patch is from the patch with the fault, in nats.
        distance: How far the fault is from the right patch.
        share: How much of the way from the right patch to the fault was gone: 0 for right, 1 for the fault.
    """

    error: float
    distance: float
    share: Slope

    @property
    def is_seen(self) -> bool:
        """What was seen is nearer to the fault than to the right patch, and not by chance."""
        return self.share.value > 0.5 and self.share.value > CERTAIN * self.share.error

    @property
    def is_hidden(self) -> bool:
        """What was seen cannot tell the fault from the right patch."""
        return self.share.error * CERTAIN > 0.5


def fit(seen: Places, patched: Values, faulty: Values) -> Fit:
    """How well a fault explains what a runtime says.

    Args:
        seen: What the runtime says with the patch.
        patched: The right patch here, at the same places.
        faulty: The patch with the fault.
    """
    share = slope(seen.served - patched, faulty - patched, seen.rows)
    return Fit(rms(seen.served - faulty), rms(faulty - patched), share)


MOST_STEPS = 8


def best_scale(seen: Places, at: Callable[[float], Values], *, starts: Sequence[float]) -> tuple[float, Values]:
    """The factor of the scale at which the patch explains best what was seen, by damped steps of Gauss and Newton.

    Args:
        seen: What the runtime says.
        at: The patch here with its scale times a factor, at the same places.
        starts: Factors, each twice the one before; the best of them is begun from.
    """

    def off(factor: float) -> float:
        return rms(seen.served - tried[factor])

    tried = {factor: at(factor) for factor in starts}
    around = min(tried, key=off)
    # The patch may be far from linear in its scale: nearer to the best of the starts, it is looked at more closely.
    tried |= {factor: at(factor) for factor in (around * 2 ** (step / 4) for step in (-3, -2, -1, 1, 2, 3))}
    best, damping = min(tried, key=off), 1.0
    step = 0.0
    for _ in range(MOST_STEPS):
        if damping == 1.0:  # it has come nearer, or just begun
            ahead = best * 1.02
            step = slope(seen.served - tried[best], (at(ahead) - tried[best]) / (ahead - best), seen.rows).value
        moved = min(max(best + damping * step, best / 2), best * 2)
        if abs(moved - best) < 1e-4 * best:
            break
        tried[moved] = at(moved)
        best, damping = (moved, 1.0) if off(moved) < off(best) else (best, damping / 3)
    return best, tried[best]
