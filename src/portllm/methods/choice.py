"""Which of several candidates to take, and how sure its agreement is: from what was counted, prompt by prompt. Pure."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from portllm.arrays import Float64
from portllm.methods.contract import Part
from portllm.patch.record import Tried

Z95 = 1.959963984540054
"""Of the normal distribution, 95 % lie within so many standard deviations."""


def choose(rows: Mapping[str, Float64[Tensor, " rows"]]) -> str:
    """The simplest candidate that is no worse than the best by more than a standard error, nor than the first one.

    What is compared is a mean over rows: distances from the old specialist, or losses of right answers. The error is
    that of the mean difference of the two candidates on the same rows.

    Source: the one-standard-error rule, Breiman, Friedman, Olshen and Stone (1984), Classification and Regression
    Trees, section 3.4.3; here with paired differences.

    Args:
        rows: Of each candidate on each row; the simplest candidate first.

    Example:
        >>> choose({"add": torch.tensor([2.0, 2.0]).double(), "refit": torch.tensor([1.0, 1.0]).double()})
        'refit'
    """
    names = list(rows)
    best = min(names, key=lambda name: float(rows[name].mean()))

    def is_as_good(name: str) -> bool:
        more = rows[name] - rows[best]
        return float(more.mean()) <= standard_error(more) and float(rows[name].mean()) <= float(rows[names[0]].mean())

    return next(name for name in names if name == best or is_as_good(name))


def weighed(
    rows: Mapping[str, Float64[Tensor, " rows"]],
    beyond: Mapping[str, Float64[Tensor, " texts"]],
    too_dear: Collection[str] = (),
) -> tuple[Tried, ...]:
    """The candidates as the record has them, compared with the best one that could be taken.

    Args:
        rows: Of each candidate on each row, as for `choose`.
        beyond: What each costs beyond addition on each general text, in nats per token; of none where there are
            none.
        too_dear: Those that cost too much there.

    Example:
        >>> nats = {"add": torch.tensor([2.0, 4.0]).double(), "refit": torch.tensor([1.0, 1.0]).double()}
        >>> weighed(nats, {})[0]
        Tried(name='add', mean=3.0, error=1.0, general_nats=None, general_error=None, is_too_dear=False)
    """
    best = min((name for name in rows if name not in too_dear), key=lambda name: float(rows[name].mean()))
    return tuple(
        Tried(
            name,
            _rounded(float(values.mean())),
            _rounded(standard_error(values - rows[best])),
            _rounded(float(beyond[name].mean())) if name in beyond else None,
            _rounded(standard_error(beyond[name])) if name in beyond else None,
            name in too_dear,
        )
        for name, values in rows.items()
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def distance(nats: Float64[Tensor, " rows"]) -> Float64[Tensor, " rows"]:
    """`√(KL / 2)`: how far two distributions are apart, at most, in total variation.

    Its mean does not hang on a few rows, as that of the divergence itself does.

    Source: Pinsker's inequality, for instance Cover and Thomas, Elements of Information Theory, lemma 11.6.1.

    Args:
        nats: Divergences KL; those below zero by rounding are taken for zero.

    Example:
        >>> distance(torch.tensor([0.0, 0.02, 2.0]).double())
        tensor([0.0000, 0.1000, 1.0000], dtype=torch.float64)
    """
    return (nats.clamp(min=0) / 2).sqrt()


def on(values: Tensor, parts: Sequence[Part], part: Part) -> Tensor:
    """The values of the prompts of a part.

    Example:
        >>> on(torch.tensor([1.0, 2.0]), ("fit", "report"), "report")
        tensor([2.])
    """
    return values[torch.tensor([each == part for each in parts])]


def standard_error(values: Float64[Tensor, " n"]) -> float:
    """Of a mean: `std / √n`; 0 for a single value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def wilson(k: float, n: float) -> tuple[float, float]:
    """The 95 % interval of a share of which k in n draws were seen.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22(158).

    Example:
        >>> [round(bound, 3) for bound in wilson(63, 64)]
        [0.917, 0.997]
    """
    center = (k + Z95**2 / 2) / (n + Z95**2)
    half = Z95 / (n + Z95**2) * math.sqrt(k * (n - k) / n + Z95**2 / 4)
    return max(0.0, center - half), min(1.0, center + half)


def clustered(shares: Float64[Tensor, " prompts"], tokens: int) -> tuple[float, float]:
    """The 95 % interval of a mean share of tokens, where prompts were drawn and not tokens.

    It is Wilson's for the effective sample size, the draws that have the mean's standard error: `n = p (1 - p) / SE²`.
    It is at least the number of prompts, as the variance of a share is at most `p (1 - p)`, and at most that of tokens.

    Source: Kish (1965), Survey Sampling, section 8.2; Franco, Little, Louis and Slud (2019), Comparative study of
    confidence intervals for proportions in complex sample surveys, J. Survey Statistics and Methodology 7(3).

    Args:
        shares: Of each prompt.
        tokens: Of all prompts.

    Example:
        >>> shares = torch.tensor([1.0, 0.75, 1.0, 1.0]).double()
        >>> [round(bound, 2) for bound in clustered(shares, tokens=16)]
        [0.71, 0.99]
    """
    mean, error = float(shares.mean()), standard_error(shares)
    draws = mean * (1 - mean) / error**2 if error else 0.0
    n = min(max(draws, len(shares)), tokens)
    return wilson(mean * n, n)
