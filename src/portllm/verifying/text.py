"""Verdicts to text for people: what `verify` found."""

from portllm.show.printable import one_line
from portllm.show.table import items
from portllm.verifying.checks import Verification

REMEDIES = {
    "base": "pass the base that the record names; for another one, port the patch to it: portllm port",
    "signature": "ask whoever signed it, and do not use it until you know why",
    "merge": "merge it again: portllm merge",
    "patch": "merge it again: portllm merge",
}
"""What to do about a check that failed, by its subject; the first that failed counts."""


def render_verification(verification: Verification) -> str:
    """What `verify` prints: the verdict with what is wrong, then a line for each check."""
    width = max(len(one_line(check.subject)) for check in verification.checks)
    wrong = [one_line(check.subject) for check in verification.checks if not check.holds]
    verdict = f"not verified ({', '.join(wrong)})" if wrong else "verified"
    lines = [f"{verdict}: {verification.kind} {one_line(verification.name)}"]
    if wrong:
        remedy = REMEDIES.get(verification.checks[[check.holds for check in verification.checks].index(False)].subject)
        lines.append(f"Next: {remedy or 'do not use it: get it again from where it came from, or make it anew'}.")
    lines += [
        f"  {'ok' if check.holds else 'NO'}  {one_line(check.subject):<{width}}  {one_line(check.finding)}"
        for check in verification.checks
    ]
    return "\n".join([*lines, *items("note", verification.notes)])
