"""How much a port can have lost, from answers that were counted: exact binomial bounds. Pure; no model, no file.

Of n inputs that are drawn independently, k are answered otherwise by the ported model than by the old specialist. A
score that counts right answers cannot fall by more than the share of all inputs whose answers differ,

    score(ported) = score(specialist) - P(turned wrong) + P(turned right) >= score(specialist) - P(answered otherwise),

and that share is at most Clopper and Pearson's upper bound u(k, n), with the confidence that was chosen.

Source: Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial,
Biometrika 26(4).
"""

import math
from dataclasses import dataclass

CONFIDENCE = 0.95
MOST_CONFIDENCE = 1 - 1e-9
"""More than this, a quarter of what is left is lost in rounding."""

POWER = 0.9
NEGLIGIBLE = 2.0**-60
"""A term this small beside the sum changes no digit of it."""


@dataclass(frozen=True, slots=True)
class InputPlan:
    """How many inputs a wanted bound takes.

    Attributes:
        n_inputs: The least number n with `u(n_allowed, n) <= bound`.
        n_allowed: How many of them may be answered otherwise.
        bound: What is wanted.
        confidence: Of the bound.
        expected: The share of all inputs that is expected to be answered otherwise.
        chance: How likely at most `n_allowed` of `n_inputs` are, if the expectation is true.
    """

    n_inputs: int
    n_allowed: int
    bound: float
    confidence: float
    expected: float
    chance: float


def upper_bound(k: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """The one-sided upper bound of a share of which k in n draws were seen.

    It is the p with `P(X <= k) = 1 - confidence` for X binomial in n and p, and 1 for k = n: whatever the true share,
    at least `confidence` of all samples give a bound that is not below it. Found by bisection; within 1e-12 for up to
    ten thousand draws, and within 1e-11 for up to a million, where `lgamma` has lost as many digits.

    Args:
        k: How often it was seen.
        n: Draws, at least one.
        confidence: Between 0 and 1, both excluded.

    Raises:
        ValueError: k is not between 0 and n, n is not positive, or the confidence is not inside (0, 1).

    Example:
        >>> f"{upper_bound(0, 300):.4f}, {upper_bound(3, 300):.4f}, {upper_bound(300, 300):.0f}"
        '0.0099, 0.0256, 1'
    """
    _check(k, n, confidence)
    if k == n:
        return 1.0
    wanted = math.log1p(-confidence)
    if k == 0:
        return -math.expm1(wanted / n)
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if log_tail(k, n, middle) > wanted:
            low = middle
        else:
            high = middle
    return high


def lower_bound(k: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """The one-sided lower bound of a share, `1 - upper_bound(n - k, n)`; arguments and errors as there.

    Example:
        >>> f"{lower_bound(297, 300):.4f}"
        '0.9744'
    """
    return 1.0 - upper_bound(n - k, n, confidence=confidence)


def change_interval(n_negative: int, n_positive: int, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a change of score over paired inputs: `P(turned right) - P(turned wrong)`.

    Each of the two shares lies between its exact bounds with a quarter of `1 - confidence` to spare on each side, so
    the interval holds the true change in at least `confidence` of all samples (Bonferroni), also where nothing turned.

    Args:
        n_negative: Inputs whose answer turned wrong.
        n_positive: Inputs whose answer turned right.
        n: All inputs.
        confidence: Of the interval.

    Raises:
        ValueError: As for `upper_bound`.

    Example:
        >>> low, high = change_interval(2, 5, 300)
        >>> f"{low:.4f} to {high:.4f}"
        '-0.0223 to 0.0414'
    """
    each = 1.0 - (1.0 - confidence) / 4.0
    low = lower_bound(n_positive, n, confidence=each) - upper_bound(n_negative, n, confidence=each)
    high = upper_bound(n_positive, n, confidence=each) - lower_bound(n_negative, n, confidence=each)
    return low, high


def least_inputs(k: int, bound: float, *, confidence: float = CONFIDENCE) -> int:
    """The least n with `upper_bound(k, n) <= bound`.

    Args:
        k: Inputs that may be answered otherwise.
        bound: Between 0 and 1, both excluded.
        confidence: Of the bound.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> least_inputs(0, 0.02), least_inputs(3, 0.02)
        (149, 386)
    """
    _check_share("the bound", bound)
    _check(k, k + 1, confidence)
    wanted = math.log1p(-confidence)
    low, high = k, k + 1  # too few, and perhaps enough
    while log_tail(k, high, bound) > wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if log_tail(k, middle, bound) > wanted else (low, middle)
    return high


def plan_inputs(
    bound: float, *, confidence: float = CONFIDENCE, expected: float = 0.0, power: float = POWER
) -> InputPlan:
    """How many inputs to draw for a wanted bound.

    With k answered otherwise, `least_inputs(k)` are needed. Of these plans it is the one with the fewest inputs that
    meets its own k with a chance of `power`, if a share of `expected` of all inputs is answered otherwise.

    Args:
        bound: The largest loss of score that is tolerated.
        confidence: Of the bound.
        expected: Share of inputs that are expected to be answered otherwise; must be below the bound.
        power: The chance that the wanted bound is met.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> plan = plan_inputs(0.02, expected=0.005)
        >>> plan.n_inputs, plan.n_allowed, f"{plan.chance:.2f}"
        (456, 4, '0.92')
    """
    _check_share("the bound", bound)
    _check_share("the power", power)
    if not 0.0 <= expected < bound:
        raise ValueError(
            f"the expected disagreement is {expected}; it must be at least 0 and less than the bound, {bound}"
        )

    def plan_with(k: int) -> InputPlan:
        n = least_inputs(k, bound, confidence=confidence)
        return InputPlan(n, k, bound, confidence, expected, math.exp(log_tail(k, n, expected)))

    low, high = -1, 0  # falls short, and may do
    while (plan := plan_with(high)).chance < power:
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        tried = plan_with(middle)
        low, high, plan = (middle, high, plan) if tried.chance < power else (low, middle, tried)
    return plan


def log_tail(k: int, n: int, p: float) -> float:
    """`log P(X <= k)` for X binomial in n and p.

    The sum begins at the term of k, by `lgamma`, and goes away from the mean, where each term is smaller than the one
    before; the other tail is its complement.

    Example:
        >>> round(math.exp(log_tail(1, 2, 0.5)), 12)
        0.75
    """
    if k >= n or p <= 0.0:
        return 0.0
    if p >= 1.0:
        return -math.inf
    if k >= n * p:
        return math.log1p(-math.exp(log_tail(n - k - 1, n, 1.0 - p)))
    first = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    )
    odds = (1.0 - p) / p
    total = term = 1.0
    for i in range(k, 0, -1):
        term *= i / (n - i + 1) * odds
        total += term
        if term < NEGLIGIBLE * total:
            break
    return first + math.log(total)


def _check(k: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is not a valid count: k must be between 0 and n, and n at least 1")
    _check_share("the confidence", confidence)


def _check_share(what: str, share: float) -> None:
    if not 0.0 < share < 1.0:
        raise ValueError(f"{what} is {share}; it must be strictly between 0 and 1")
