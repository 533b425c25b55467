"""Verdicts to text for people: what `verify` found."""

from portllm.show.printable import one_line
from portllm.show.table import items
from portllm.verifying.checks import Verification


def render_verification(verification: Verification) -> str:
    """What `verify` prints: the verdict with what is wrong, then a line for each check."""
    width = max(len(one_line(check.subject)) for check in verification.checks)
    wrong = [one_line(check.subject) for check in verification.checks if not check.holds]
    verdict = f"not verified ({', '.join(wrong)})" if wrong else "verified"
    lines = [f"{verdict}: {verification.kind} {one_line(verification.name)}"]
    lines += [
        f"  {'ok' if check.holds else 'NO'}  {one_line(check.subject):<{width}}  {one_line(check.finding)}"
        for check in verification.checks
    ]
    return "\n".join([*lines, *items("note", verification.notes)])
