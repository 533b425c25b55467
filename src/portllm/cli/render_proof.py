"""Verdicts to text for people: what `verify` found."""

from portllm.pipeline.verify import Verification


def render_verification(verification: Verification) -> str:
    """What `verify` prints: a line for each check, and the verdict last."""
    width = max(len(check.subject) for check in verification.checks)
    lines = [f"{verification.kind} {verification.name}"]
    lines += [
        f"  {'ok' if check.holds else 'NO'}  {check.subject:<{width}}  {check.finding}" for check in verification.checks
    ]
    lines += [f"  note: {note}" for note in verification.notes]
    wrong = [check.subject for check in verification.checks if not check.holds]
    lines.append(f"not verified: {', '.join(wrong)}" if wrong else "verified")
    return "\n".join(lines)
