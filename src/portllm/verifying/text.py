"""Verdicts to text for people: what `verify` found."""

from portllm.show.printable import one_line
from portllm.show.table import items
from portllm.verifying.checks import Verification


def render_verification(verification: Verification) -> str:
    """What `verify` prints: a line for each check, and the verdict last."""
    width = max(len(one_line(check.subject)) for check in verification.checks)
    lines = [f"{verification.kind} {verification.name}"]
    lines += [
        f"  {'ok' if check.holds else 'NO'}  {one_line(check.subject):<{width}}  {one_line(check.finding)}"
        for check in verification.checks
    ]
    lines += items("note", verification.notes)
    wrong = [one_line(check.subject) for check in verification.checks if not check.holds]
    lines.append(f"not verified: {', '.join(wrong)}" if wrong else "verified")
    return "\n".join(lines)
