"""Certificates to text for people."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.assess.certificate import InputPlan, upper_bound
from portllm.cli.render import items, percent, table
from portllm.output.certificate import ASSUMES, CERTIFICATE_FILE, Certificate, Side

if TYPE_CHECKING:
    from portllm.pipeline.certify import CertifyPlan

SHOWN_ROWS = 10


def upper_percent(share: float) -> str:
    """A bound in percent, rounded up: what is shown still holds.

    Example:
        >>> upper_percent(0.0256012), upper_percent(0.01), upper_percent(1.0)
        ('2.57 %', '1.00 %', '100.00 %')
    """
    return f"{min(math.ceil(share * 10_000 - 1e-9) / 100, 100):.2f} %"


def render_certificate(certificate: Certificate, folder: Path) -> str:
    """What `certify` prints: what was asked, what was counted, and what follows."""
    inputs, differing, labels, tokens = (
        certificate.inputs, certificate.differing, certificate.labels, certificate.tokens
    )  # fmt: skip
    n = certificate.n
    rows = {
        "old specialist": _side(certificate.specialist),
        "ported": _side(certificate.ported),
        "inputs": f"{n} rows" if inputs.sample is None else f"{n} of {inputs.rows} rows, drawn with seed {inputs.seed}",
        "answers": {
            "choices": f"the likeliest of {len(certificate.answers.choices)} choices",
            "exact": "what is written, compared whole",
            "free": "free text, compared token by token",
        }[certificate.answers.kind],
    }
    if differing is not None and certificate.bound is not None:
        more = f" and {len(differing) - SHOWN_ROWS} more" if len(differing) > SHOWN_ROWS else ""
        named = f" (rows {', '.join(map(str, differing[:SHOWN_ROWS]))}{more})" if differing else ""
        rows["answered otherwise"] = f"{len(differing)} of {n}{named}; {_at_most(certificate.bound, certificate)}"
    if labels is not None:
        change = (labels.ported_right - labels.specialist_right) / n
        interval = f"{_points(labels.change_low)} to {_points(labels.change_high)}"
        rows["right"] = f"{labels.specialist_right} before, {labels.ported_right} now"
        rows["negative flips"] = f"{labels.negative_flips} of {n}; {_at_most(labels.bound, certificate)}"
        rows["change of the score"] = f"{_points(change)} points; {interval} with {_confidence(certificate)}"
    if tokens is not None:
        rows["tokens alike"] = (
            f"{percent(tokens.same / tokens.written)} of the {tokens.written:,} that the specialist writes"
        )
        rows["inputs alike"] = f"{tokens.inputs_same} of {n}, every token"
    lines = [f"certificate {folder / CERTIFICATE_FILE}", *table(rows), *items("note", _notes(certificate))]
    return "\n".join([*lines, *_claim(certificate)])


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
    allowed = (
        "none of them may be answered otherwise"
        if plan.n_allowed == 0
        else f"at most {plan.n_allowed} of them may be answered otherwise"
    )
    bound, confidence, expected = (
        percent(plan.bound, digits=2),
        percent(plan.confidence),
        percent(plan.expected, digits=2),
    )
    lines = [
        f"{plan.n_inputs:,} inputs: {allowed} for a bound of {bound}, with {confidence} confidence",
        f"if {expected} of all inputs are answered otherwise, the bound is met with a chance of {percent(plan.chance)}",
    ]
    return "\n".join([*lines, ASSUMES])


def _claim(certificate: Certificate) -> list[str]:
    if certificate.loss_bound is None:
        return ["no bound follows: the score of a free text can fall though most of its tokens agree"]
    bound = upper_percent(certificate.loss_bound)
    lines = [f"score(ported) >= score(old specialist) - {bound}, with {_confidence(certificate)}", ASSUMES]
    if certificate.met is not None and certificate.wanted is not None:
        verdict = "met" if certificate.met else "NOT met"
        lines.append(f"{verdict}: the bound asked for is {percent(certificate.wanted, digits=2)}")
    return lines


def _notes(certificate: Certificate) -> list[str]:
    inputs, notes = certificate.inputs, []
    if certificate.answers.choices_from == "labels":
        notes.append("the choices were taken from these rows; name them with --choices, so that they are not looked at")
    if inputs.repeated:
        notes.append(f"{inputs.repeated} prompts had been asked before: rows that were copied are no independent draws")
    if inputs.cut:
        notes.append(f"{inputs.cut} prompts were longer than --max-tokens and lost their beginning")
    return notes


def _side(side: Side) -> str:
    return side.model.name if side.patch is None else f"{side.model.name} + {side.patch.name}"


def _at_most(bound: float, certificate: Certificate) -> str:
    return f"of all inputs at most {upper_percent(bound)}, with {_confidence(certificate)}"


def _confidence(certificate: Certificate) -> str:
    return f"{100 * certificate.confidence:g} % confidence"


def _points(change: float) -> str:
    return f"{100 * change:+.1f}"
