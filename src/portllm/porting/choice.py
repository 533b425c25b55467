"""Which method carries a patch, from what was measured of it and the update. Pure: a verdict in, a decision out.

The table is climbed from the cheapest method on; what each is known to carry stands in its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checking.verdict import Answer, Verdict
from portllm.methods.contract import Need
from portllm.methods.table import METHODS


@dataclass(frozen=True, slots=True)
class Decision:
    """A method, or none.

    Attributes:
        method: Its id in `METHODS`; None where no method is known to carry the patch.
        reason: Why.
        is_forced: Whether the verdict speaks against it, and it was asked for all the same.
    """

    method: str | None
    reason: str
    is_forced: bool = False


def choose(
    verdict: Verdict, evidence: Mapping[str, float] | None = None, *, force: bool = False, reads: bool = False
) -> Decision:
    """The cheapest method that is known to carry a patch.

    Args:
        verdict: What `check` found of the patch.
        evidence: The numbers that it rests on.
        force: Where none suits, take the cheapest all the same. What cannot be ported is not ported by force.
        reads: Whether there are prompts to measure by. The one that reads them then tries the cheaper ones first.

    Example:
        >>> from portllm.checking.verdict import Reason
        >>> lost = Verdict(Answer.WILL_NOT_HOLD, (Reason(Answer.WILL_NOT_HOLD, "the weights have nothing in common."),))
        >>> choose(lost).method is None
        True
        >>> choose(lost, force=True).reason
        "'add' was forced: the weights have nothing in common."
    """
    why = verdict.reasons[0].text if verdict.reasons else "no evidence for or against the patch was found."
    if verdict.answer is Answer.CANNOT_BE_PORTED:
        return Decision(None, f"no method can port an incompatible patch: {why}")
    if reads:
        reader = next(method for method in METHODS.values() if Need.STREAMS in method.needs)
        return Decision(reader.id, f"'{reader.id}' tries addition first and measures what it tries: {why}")
    for method in METHODS.values():
        if (suits := method.suits(verdict.answer, evidence or {})) is not None:
            return Decision(method.id, f"{suits}: {why}")
    if not force:
        return Decision(None, f"no method is known to port it: {why}")
    cheapest = next(iter(METHODS))
    return Decision(cheapest, f"'{cheapest}' was forced: {why}", is_forced=True)
