"""Certificates to text for people."""

from pathlib import Path
from typing import TYPE_CHECKING

from portllm.certifying.bounds import InputPlan, upper_bound
from portllm.certifying.certificate import ASSUMES, CERTIFICATE_FILE, Certificate
from portllm.certifying.tables import certificate_facts, certificate_notes, claim, met_text
from portllm.show.numbers import percent, upper_percent
from portllm.show.table import items, table

if TYPE_CHECKING:
    from portllm.certifying.certify import CertifyPlan


def render_certificate(certificate: Certificate, folder: Path) -> str:
    """What `certify` prints: what was asked, what was counted, and what follows."""
    lines = [f"certificate {folder / CERTIFICATE_FILE}", *table(certificate_facts(certificate))]
    lines += [*items("note", certificate_notes(certificate)), claim(certificate)]
    if certificate.loss_bound is not None:
        lines.append(ASSUMES)
    return "\n".join([*lines, *filter(None, [met_text(certificate)])])


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
        f"{plan.n_inputs:,} inputs: {allowed} for a bound of {bound}, with {confidence} confidence",
        f"if {expected} of all answers differ, the bound is met with probability {percent(plan.chance)}",
    ]
    return "\n".join([*lines, ASSUMES])
