"""How long the steps that are left will take, from those that are done. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from portllm.study.definition.plan import Step


@dataclass(frozen=True, slots=True)
class Estimated:
    """Steps to come.

    Attributes:
        steps: In order.
        seconds: That they will take, as far as one can tell.
        n_unknown: Of them, those of a kind of which none is done.
    """

    steps: tuple[Step, ...]
    seconds: float
    n_unknown: int


def estimate(left: Sequence[Step], done: Mapping[Step, float], *, workers: int = 1) -> Estimated:
    """The time for the steps that are left: each as long as the mean of those of its kind and task, or of its kind.

    Args:
        left: Steps to do.
        done: Seconds of those that are done.
        workers: How many do them, taken to be busy to the end; the last steps may leave some idle.

    Example:
        >>> score = Step("score", "base", task="a")
        >>> left = [Step("score", "wiki.1", task="a"), Step("drift", "wiki.1")]
        >>> estimate(left, {score: 2.0}).seconds, estimate(left, {score: 2.0}, workers=2).seconds
        (2.0, 1.0)
    """
    total, n_unknown = 0.0, 0
    for step in left:
        alike = [seconds for other, seconds in done.items() if (other.kind, other.task) == (step.kind, step.task)]
        alike = alike or [seconds for other, seconds in done.items() if other.kind == step.kind]
        total += fmean(alike) if alike else 0.0
        n_unknown += not alike
    return Estimated(tuple(left), total / workers, n_unknown)
