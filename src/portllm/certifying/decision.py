"""What `certify` says first: how much may be lost, whether that is within the user's limit, what to do next. Pure."""

from collections.abc import Iterator

from portllm.certifying.certificate import ASSUMES, Certificate
from portllm.certifying.tables import certificate_doubts
from portllm.evaluating.decision import Compared, merge_command, points_text, retrain_command
from portllm.show.headline import Headline, Tone, command_line
from portllm.show.numbers import counted, percent, points, upper_points


def decide(certificate: Certificate, *, compared: Compared | None = None) -> Headline:
    """The sentence to act on.

    Args:
        certificate: As it was written.
        compared: Names for the next command; without them there is none.
    """
    bound, n, wanted = certificate.loss_bound, certificate.n, certificate.wanted
    if bound is None or certificate.k is None:
        same = certificate.tokens
        alike = "" if same is None else f"; {percent(same.same / same.written)} of its tokens are alike"
        return Headline(
            "plain",
            f"Gives no bound on the loss: free text can go wrong by a single token{alike}.",
            certificate_doubts(certificate),
        )
    counts = f"{certificate.k:,} of {counted(n, 'answer')} differ"
    if certificate.labels is not None:
        counts += f", {certificate.labels.negative_flips:,} turned wrong"
    text = (
        f"Loses at most {upper_points(bound)} points of accuracy against before the update, with "
        f"{100 * certificate.confidence:g} % confidence, if the inputs are random draws; {counts}"
    )
    if wanted is None:
        next_ = "name the loss that you can accept, such as --max-loss 2, for a verdict" if compared else ""
        return Headline("plain", f"{text}.", list(_reasons(certificate)), next_)
    limit = f"your limit of {points_text(wanted)}"
    next_, command = _next(certificate, certificate.k, wanted, compared) if compared else ("", "")
    tone: Tone
    if not certificate.met:
        lost = max(0.0, -_change(certificate)) > wanted
        said = "not safe to ship: beyond" if lost else "not shown to be safe: the bound is beyond"
        tone, verdict = ("bad" if lost else "doubt"), f"{said} {limit}."
    elif certificate_doubts(certificate):
        tone, verdict = "doubt", f"within {limit}, but the inputs are in doubt."
    else:
        tone, verdict = "good", f"safe to ship by {limit}."
    return Headline(tone, f"{text}; {verdict}", list(_reasons(certificate)), next_, command)


def _change(certificate: Certificate) -> float:
    """The change of the score that was seen; 0 where no answer was known to be right."""
    labels = certificate.labels
    return 0.0 if labels is None else (labels.ported_right - labels.specialist_right) / certificate.n


def _reasons(certificate: Certificate) -> Iterator[str]:
    labels = certificate.labels
    if labels is not None:
        before, now = (right / certificate.n for right in (labels.specialist_right, labels.ported_right))
        yield f"{percent(now)} right, {percent(before)} before the update: {points(now - before)} points on these rows."
    yield from certificate_doubts(certificate)
    yield ASSUMES


def _next(certificate: Certificate, k: int, wanted: float, compared: Compared) -> tuple[str, str]:
    if certificate.met and certificate_doubts(certificate):
        return "certify again, with inputs that are random draws and --choices named beforehand", ""
    if certificate.met and compared.merged is not None:
        return f"serve {compared.merged}", ""
    if certificate.met:
        return "serve the adapter, or merge it", merge_command(compared)
    seen = (k if certificate.labels is None else certificate.labels.negative_flips) / certificate.n
    if seen >= wanted:
        return "train on from the ported patch", retrain_command(compared) if compared.merged is None else ""
    plan = command_line("portllm", "certify", "--plan", "--max-loss", f"{100 * wanted:g}")
    return "ask how many freshly drawn inputs that takes", f"{plan} --expected-disagreement {seen:.3g}"
