"""Which method carries a patch, from what was measured of it and the update. Pure: a verdict in, a decision out.

A new method in `METHODS` that carries on where addition stops gets its rule here, by what the verdict's reasons say.
"""

from dataclasses import dataclass

from portllm.checking.verdict import Answer, Verdict


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


def choose(verdict: Verdict, *, force: bool = False) -> Decision:
    """The method that a verdict leads to.

    Addition is taken unless it is known to fail: where it holds, and where nobody has measured whether it does.

    Args:
        verdict: What `check` found of the patch.
        force: Take addition though it will not hold. What cannot be ported is not ported by force.

    Example:
        >>> from portllm.checking.verdict import Reason
        >>> lost = Verdict(Answer.WILL_NOT_HOLD, (Reason(Answer.WILL_NOT_HOLD, "the weights have nothing in common."),))
        >>> choose(lost).method is None
        True
        >>> choose(lost, force=True).reason
        'addition was forced: the weights have nothing in common.'
    """
    why = verdict.reasons[0].text if verdict.reasons else "nothing was found for or against the patch."
    match verdict.answer:
        case Answer.HOLDS:
            return Decision("add", f"addition is known to hold: {why}")
        case Answer.UNCERTAIN:
            return Decision("add", f"addition may hold, and nothing found rules it out: {why}")
        case Answer.WILL_NOT_HOLD if force:
            return Decision("add", f"addition was forced: {why}", is_forced=True)
        case Answer.WILL_NOT_HOLD:
            return Decision(None, f"no method is known to carry it: {why}")
        case Answer.CANNOT_BE_PORTED:
            return Decision(None, f"no method carries what does not fit: {why}")
