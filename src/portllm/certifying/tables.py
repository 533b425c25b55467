"""What a certificate says as tables and lines, for the terminal and the page alike. Pure."""

from portllm.certifying.certificate import Certificate, Side
from portllm.show.numbers import percent, points, upper_percent

SHOWN_ROWS = 10


def certificate_facts(certificate: Certificate) -> dict[str, str]:
    """What was asked, and what was counted."""
    inputs, differing, labels, tokens = (
        certificate.inputs, certificate.differing, certificate.labels, certificate.tokens
    )  # fmt: skip
    n = certificate.n
    rows = {
        "old specialist": side_name(certificate.specialist),
        "ported": side_name(certificate.ported),
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
        interval = f"{points(labels.change_low)} to {points(labels.change_high)}"
        rows["right"] = f"{labels.specialist_right} before, {labels.ported_right} now"
        rows["negative flips"] = f"{labels.negative_flips} of {n}; {_at_most(labels.bound, certificate)}"
        rows["change of the score"] = f"{points(change)} points; {interval} with {confidence_text(certificate)}"
    if tokens is not None:
        rows["tokens alike"] = (
            f"{percent(tokens.same / tokens.written)} of the {tokens.written:,} that the specialist writes"
        )
        rows["inputs alike"] = f"{tokens.inputs_same} of {n}, every token"
    return rows


def claim(certificate: Certificate) -> str:
    """What follows, in one line."""
    if certificate.loss_bound is None:
        return "no bound follows: the score of a free text can fall though most of its tokens agree"
    bound = upper_percent(certificate.loss_bound)
    return f"score(ported) >= score(old specialist) - {bound}, with {confidence_text(certificate)}"


def met_text(certificate: Certificate) -> str | None:
    """Whether the bound is as small as was asked for; None where nothing was."""
    if certificate.met is None or certificate.wanted is None:
        return None
    return f"{'met' if certificate.met else 'NOT met'}: the bound asked for is {percent(certificate.wanted, digits=2)}"


def certificate_notes(certificate: Certificate) -> list[str]:
    """What is special about what was asked."""
    inputs, notes = certificate.inputs, []
    if certificate.answers.choices_from == "labels":
        notes.append("the choices were taken from these rows; name them with --choices, so that they are not looked at")
    if inputs.repeated:
        notes.append(f"{inputs.repeated} prompts had been asked before: rows that were copied are no independent draws")
    if inputs.cut:
        notes.append(f"{inputs.cut} prompts were longer than --max-tokens and lost their beginning")
    return notes


def side_name(side: Side) -> str:
    """A model and the patch on it."""
    return side.model.name if side.patch is None else f"{side.model.name} + {side.patch.name}"


def confidence_text(certificate: Certificate) -> str:
    """The confidence of bound and interval, each for itself."""
    return f"{100 * certificate.confidence:g} % confidence"


def _at_most(bound: float, certificate: Certificate) -> str:
    return f"of all inputs at most {upper_percent(bound)}, with {confidence_text(certificate)}"
