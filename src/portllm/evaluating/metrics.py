"""Numbers about rows: scores and losses with intervals, retention, flips. Pure; randomness by a seed.

Rows are paired: row `i` is the same input whatever the model, so differences and ratios are resampled by rows, all
models together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

from portllm.arrays import Float64

CONFIDENCE = 0.95
RESAMPLES = 2000

Column = Float64[np.ndarray, " rows"]
Means = Float64[np.ndarray, " resamples"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows and the interval that the rows leave for it.

    Attributes:
        value: The mean.
        low: Lower end of the interval; None where one row cannot tell.
        high: Upper end.
        n_rows: Rows it comes from.
    """

    value: float
    low: float | None
    high: float | None
    n_rows: int

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {"value": self.value, "low": self.low, "high": self.high, "n_rows": self.n_rows}


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of what retraining gains, porting gains: 1 is all of it, 0 nothing.

    Attributes:
        value: `(ported - evolved) / (retrained - evolved)`, or None where it is not a number.
        low: Lower end of its interval, None like the value.
        high: Upper end.
        reason: Why it is not a number; empty where it is one.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        """The fields by name."""
        return {"value": self.value, "low": self.low, "high": self.high, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Flips:
    """Rows whose answer turned from right to wrong, or from wrong to right.

    Attributes:
        negative: Indices of the rows that were right and are wrong.
        positive: Indices of the rows that were wrong and are right.
        n_rows: All rows.
    """

    negative: tuple[int, ...]
    positive: tuple[int, ...]
    n_rows: int

    def to_json(self) -> dict[str, object]:
        """Counts, and the rows that turned wrong, counted from 1 as in every message."""
        return {
            "negative": len(self.negative),
            "positive": len(self.positive),
            "n_rows": self.n_rows,
            "negative_rows": [index + 1 for index in self.negative],
        }


def accuracy(correct: Sequence[bool], *, confidence: float = CONFIDENCE) -> Estimate:
    """The share of right answers with Wilson's interval.

    With `p = k/n` and `z` the normal quantile, the interval is
    `(p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)`: unlike `p ± z √(p(1-p)/n)` it stays in [0, 1] and has a width
    where all or none are right (Wilson, 1927).

    Args:
        correct: One entry a row, at least one.
        confidence: Share of such intervals that hold the true share.

    Example:
        >>> estimate = accuracy([True] * 8 + [False] * 2)
        >>> f"{estimate.value:.2f} in [{estimate.low:.3f}, {estimate.high:.3f}]"
        '0.80 in [0.490, 0.943]'
    """
    n = len(correct)
    share = sum(correct) / n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((center + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    # At 0 and 1 the formula meets the edge exactly; rounding may leave it on the wrong side.
    return Estimate(value=share, low=max(0.0, min(low, share)), high=min(1.0, max(high, share)), n_rows=n)


def mean_loss(losses: Sequence[float], *, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of losses by rows, with the interval `mean ± z s/√n`, `s` the standard deviation of the rows.

    Args:
        losses: One entry a row, at least one.
        confidence: Share of such intervals that hold the true mean, for some dozens of rows or more.

    Example:
        >>> mean_loss([1.0, 3.0]).value
        2.0
    """
    values = np.asarray(losses, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(value=mean, low=None, high=None, n_rows=len(values))
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(value=mean, low=mean - half, high=mean + half, n_rows=len(values))


def mean_words(answers: Sequence[str]) -> float:
    """Words of an answer, parted by blanks, on average.

    Example:
        >>> mean_words(["Paris", "The capital of France"])
        2.5
    """
    return fmean(len(answer.split()) for answer in answers)


def accuracy_change(after: Sequence[bool], before: Sequence[bool], *, confidence: float = CONFIDENCE) -> Estimate:
    """The change of the share of right answers over paired rows, with Bonett and Price's interval.

    With b answers of n turned right, c turned wrong, `p = (b + 1)/(n + 2)`, `q = (c + 1)/(n + 2)` and `z` the normal
    quantile, the interval is `p - q ± z √((p + q - (p - q)²)/(n + 2))`. Unlike a bootstrap's it has a width where no
    answer turned: that nothing was lost on a few rows does not say that nothing will be (Bonett and Price, 2012,
    Adjusted Wald confidence interval for a difference of binomial proportions based on paired data).

    Args:
        after: One entry a row.
        before: The same rows under another model.
        confidence: Share of such intervals that hold the true change, for some dozens of rows or more.

    Example:
        >>> change = accuracy_change([False] + [True] * 79, [True] * 80)
        >>> f"{change.value:.4f} in [{change.low:.4f}, {change.high:.4f}]"
        '-0.0125 in [-0.0535, 0.0291]'
    """
    turned = flips(before, after)
    return change_of_counts(len(turned.positive), len(turned.negative), turned.n_rows, confidence=confidence)


def change_of_counts(n_right: float, n_wrong: float, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """As `accuracy_change`, from how many of n answers turned right and wrong; also of counts that are expected."""
    value = (n_right - n_wrong) / n
    p, q = (n_right + 1) / (n + 2), (n_wrong + 1) / (n + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, min(p - q - half, value)), min(1.0, max(p - q + half, value))
    return Estimate(value=value, low=low, high=high, n_rows=n)


def paired_change(
    after: Sequence[float],
    before: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """The mean of `after - before` over rows, with the percentile interval of a bootstrap over rows.

    Args:
        after: One entry a row.
        before: The same rows under another model.
        seed: Of the resampling.
        resamples: How many.
        confidence: Share of the resampled means inside the interval.
    """
    new, old = _columns(after, before)
    change = new - old
    means = _resampled_means([change], seed=seed, resamples=resamples)[0]
    low, high = _ends(means, means, confidence=confidence)
    return Estimate(value=float(change.mean()), low=low, high=high, n_rows=len(change))


def retention(
    *,
    evolved: Sequence[float],
    ported: Sequence[float],
    retrained: Sequence[float],
    lower_is_better: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Retention:
    """The share of retraining's gain over the evolved model that the ported patch has.

    `(ported - evolved) / (retrained - evolved)`, of means over the same rows. Where a bootstrap over rows cannot tell
    the gain below the line from zero, or it is a loss, the ratio is not a number and the reason says why. The interval
    holds the middle share of the ratios of the resamples; one whose gain is not above zero counts as both ends.

    Args:
        evolved: One entry a row: right or wrong, or a loss.
        ported: The same rows with the ported patch.
        retrained: The same rows with a patch trained on the evolved model.
        lower_is_better: True for losses.
        seed: Of the resampling.
        resamples: How many.
        confidence: Of the interval, and of the test of the gain.

    Example:
        >>> retention(evolved=[0, 0, 0, 0], ported=[1, 1, 1, 0], retrained=[1, 1, 1, 1]).value
        0.75
    """
    sign = -1.0 if lower_is_better else 1.0
    rows = _columns(evolved, ported, retrained)
    gain_ported, gain_retrained = sign * (rows[1] - rows[0]), sign * (rows[2] - rows[0])
    above, below = _resampled_means([gain_ported, gain_retrained], seed=seed, resamples=resamples)
    low, high = _ends(below, below, confidence=confidence)
    gain = float(gain_retrained.mean())
    if low <= 0.0:
        what = "loss" if lower_is_better else "score"
        return Retention(
            value=None,
            low=None,
            high=None,
            reason=f"retraining gains {gain:.3f} in {what} over the evolved model, between {low:.3f} and "
            f"{high:.3f}: indistinguishable from zero",
        )
    ratios = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    low, high = _ends(
        np.where(np.isnan(ratios), -np.inf, ratios), np.where(np.isnan(ratios), np.inf, ratios), confidence=confidence
    )
    return Retention(value=float(gain_ported.mean()) / gain, low=low, high=high)


def flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """The rows whose answers changed sides between two models (negative flips: Echterhoff et al., 2024).

    Example:
        >>> flips([True, True, False], [True, False, True])
        Flips(negative=(1,), positive=(2,), n_rows=3)
    """
    pairs = list(enumerate(zip(before, after, strict=True)))
    return Flips(
        negative=tuple(index for index, (was, now) in pairs if was and not now),
        positive=tuple(index for index, (was, now) in pairs if now and not was),
        n_rows=len(pairs),
    )


def _columns(*columns: Sequence[float]) -> list[Column]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"columns of {[len(array) for array in arrays]} rows are not paired")
    return arrays


def _resampled_means(columns: Sequence[Column], *, seed: int, resamples: int) -> list[Means]:
    """Means of each column over rows drawn with replacement, the same rows for all columns."""
    n = len(columns[0])
    generator = np.random.Generator(np.random.PCG64(seed))
    # How often each row is drawn is all that a mean needs; in blocks, so that memory stays small for long files.
    means: list[list[float]] = [[] for _ in columns]
    block = max(1, 2_000_000 // n)
    for start in range(0, resamples, block):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(block, resamples - start))
        for column, collected in zip(columns, means, strict=True):
            collected.extend((counts @ column / n).tolist())
    return [np.asarray(collected) for collected in means]


def _ends(
    lows: Means,
    highs: Means,
    *,
    confidence: float,
) -> tuple[float, float]:
    """The percentile ends, each an order statistic on the outer side: no mixing of finite and infinite values."""
    tail = (1 - confidence) / 2
    return (
        float(np.quantile(lows, tail, method="lower")),
        float(np.quantile(highs, 1 - tail, method="higher")),
    )
