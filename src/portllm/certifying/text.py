"""Certificates to text for people."""

from pathlib import Path
from typing import TYPE_CHECKING

from portllm.certifying.bounds import InputPlan, upper_bound
from portllm.certifying.certificate import ASSUMES, CERTIFICATE_FILE, Certificate
from portllm.certifying.tables import certificate_facts, certificate_notes, claim
from portllm.show.headline import Headline, headline_lines
from portllm.show.numbers import percent, upper_percent
from portllm.show.table import items, table

if TYPE_CHECKING:
    from portllm.certifying.certify import CertifyPlan


def render_certificate(certificate: Certificate, folder: Path, headline: Headline) -> str:
    """What `certify` prints: the sentence to act on, what to do next, what was counted, and what follows."""
    lines = [*headline_lines(headline), "", f"certificate {folder / CERTIFICATE_FILE}"]
    lines += [*table(certificate_facts(certificate)), *items("note", certificate_notes(certificate))]
    return "\n".join([*lines, claim(certificate)])


def render_certify_plan(plan: "CertifyPlan", folder: Path) -> str:
    """What `certify --dry-run` prints."""
    asked, confidence = plan.asked, plan.settings.confidence
    best = upper_bound(0, len(asked.rows), confidence=confidence)
    lines = [f"would ask {' and '.join(one.name for one in plan.respondents)} {len(asked.rows)} questions; the first:"]
    lines += [asked.questions.prompts[0], f"and write {folder / CERTIFICATE_FILE}"]
    if plan.settings.kind != "free":
        lines.append(f"the bound would be {upper_percent(best)} if every answer is the same")
    return "\n".join(lines)


def render_input_plan(plan: InputPlan) -> str:
    """What `certify --plan` prints."""
    allowed = "no answer may differ" if plan.n_allowed == 0 else f"at most {plan.n_allowed} answers may differ"
    bound, confidence, expected = (
        percent(plan.bound, digits=2),
        percent(plan.confidence),
        percent(plan.expected, digits=2),
    )
    lines = [
        f"{plan.n_inputs:,} inputs are needed to rule out a loss of more than {bound} with {confidence} confidence; "
        f"{allowed}.",
    ]
    if plan.expected:
        lines.append(
            f"If {expected} of all answers differ, it is ruled out with a probability of {percent(plan.chance)}."
        )
    return "\n".join([*lines, ASSUMES])
