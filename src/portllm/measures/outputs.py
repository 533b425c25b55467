"""How far what a model says is from what another says to the same prompts. Pure numpy, in float64.

    KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v))    of one prompt, in nats

With the old specialist's answer p, that of the evolved model without a patch q and with the ported patch q', the share
of the specialist's effect that the port keeps is `1 - Σ KL(p ‖ q') / Σ KL(p ‖ q)`, sums over prompts: 1 where the
ported model says what the specialist said, 0 where the port is no nearer to it than the evolved model alone, and below
0 where it leads away.
"""

import math
from dataclasses import dataclass

import numpy as np

from portllm.arrays import Float, Float64


@dataclass(frozen=True, slots=True)
class Distance:
    """From one model's answers to another's.

    Attributes:
        nats: `KL(first ‖ second)` of each prompt.
        agreement: The share of prompts to which both give the same likeliest token.
    """

    nats: tuple[float, ...]
    agreement: float

    @property
    def mean(self) -> float:
        """The mean of `nats`."""
        return math.fsum(self.nats) / len(self.nats)


def measure_distance(
    first: Float[np.ndarray, "prompts vocabulary"], second: Float[np.ndarray, "prompts vocabulary"]
) -> Distance:
    """Compare what two models say, from their logits for the next token.

    Args:
        first: Of the model whose answers are the measure; one row a prompt.
        second: Of the other.

    Example:
        >>> logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> found = measure_distance(logits, np.zeros((2, 2)))
        >>> [round(nats, 3) for nats in found.nats], found.agreement
        ([0.0, 0.368], 1.0)
    """
    nats, agreed = [], 0
    for one, other in zip(first, second, strict=True):
        log_p, log_q = _log_softmax(one), _log_softmax(other)
        nats.append(max(0.0, float(np.vdot(np.exp(log_p), log_p - log_q))))
        agreed += int(log_p.argmax() == log_q.argmax())
    return Distance(tuple(nats), agreed / len(nats))


@dataclass(frozen=True, slots=True)
class Shift:
    """What a patch does to log-probabilities in two models, beside each other.

    With `a = log p_specialist - log p_base` and `b = log p_ported - log p_evolved`, each without its mean, products are
    `<a, b> = Σ_v w(v) a(v) b(v)` under the weights `w = (p_specialist + p_base) / 2`, and add up over prompts. What the
    update does to both evolved models falls out.

    Attributes:
        cosine: `<a, b> / √(<a, a> <b, b>)`: 1 where the patch moves the evolved model's answers as it moved the base's.
        ratio: `√(<b, b> / <a, a>)`: how much as far.
    """

    cosine: float
    ratio: float


def measure_shift(
    base: Float[np.ndarray, "prompts vocabulary"],
    specialist: Float[np.ndarray, "prompts vocabulary"],
    evolved: Float[np.ndarray, "prompts vocabulary"],
    ported: Float[np.ndarray, "prompts vocabulary"],
) -> Shift | None:
    """Compare what a patch does to answers in two models, from their logits for the next token.

    Returns:
        None where the patch does nothing to the answers of one of the models.

    Example:
        >>> base, evolved = np.zeros((1, 2)), np.array([[3.0, 0.0]])
        >>> shift = measure_shift(base, base + [1.0, 0.0], evolved, evolved + [2.0, 0.0])
        >>> round(shift.cosine, 9), round(shift.ratio, 9)
        (1.0, 2.0)
    """
    product = old_sq = new_sq = 0.0
    for logits in zip(base, specialist, evolved, ported, strict=True):
        was, is_, stays, becomes = map(_log_softmax, logits)
        weights = (np.exp(was) + np.exp(is_)) / 2
        old, new = (moved - float(np.vdot(weights, moved)) for moved in (is_ - was, becomes - stays))
        product += float(np.vdot(weights * old, new))
        old_sq += float(np.vdot(weights * old, old))
        new_sq += float(np.vdot(weights * new, new))
    if not old_sq or not new_sq:
        return None
    return Shift(min(1.0, max(-1.0, product / math.sqrt(old_sq * new_sq))), math.sqrt(new_sq / old_sq))


def _log_softmax(logits: Float[np.ndarray, " vocabulary"]) -> Float64[np.ndarray, " vocabulary"]:
    shifted = logits.astype(np.float64) - float(logits.max())
    found: Float64[np.ndarray, " vocabulary"] = shifted - math.log(float(np.exp(shifted).sum()))
    return found


@dataclass(frozen=True, slots=True)
class KeptShare:
    """A share, and its standard error over prompts.

    Attributes:
        value: The share.
        error: Its standard error; infinite for a single prompt.
    """

    value: float
    error: float


def effect_kept(ported: Distance, evolved: Distance) -> KeptShare | None:
    """The share of the old specialist's effect that a port keeps: `1 - Σ ported / Σ evolved`.

    Its error is that of a ratio of two sums over the same prompts (the delta method):
    `√(n / (n - 1) Σ (ported_i - R evolved_i)²) / Σ evolved_i` with the ratio R.

    Args:
        ported: From the specialist to the evolved model with the ported patch.
        evolved: From the specialist to the evolved model without it.

    Returns:
        None where the evolved model says what the specialist says without a patch.

    Example:
        >>> effect_kept(Distance((0.25, 0.5), 1.0), Distance((1.0, 2.0), 0.0))
        KeptShare(value=0.75, error=0.0)
    """
    n, total = len(evolved.nats), math.fsum(evolved.nats)
    if not total:
        return None
    ratio = math.fsum(ported.nats) / total
    rest = math.fsum((one - ratio * other) ** 2 for one, other in zip(ported.nats, evolved.nats, strict=True))
    return KeptShare(1.0 - ratio, math.sqrt(n / (n - 1) * rest) / total if n > 1 else math.inf)
