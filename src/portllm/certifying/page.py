"""The page of `certify`: the bound, what it says and what not, what was counted, and the answers that differ. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from portllm.certifying.bounds import POWER, least_inputs, plan_inputs
from portllm.certifying.certificate import ASSUMES, Certificate
from portllm.certifying.decision import decide
from portllm.certifying.tables import certificate_facts, certificate_notes, claim, confidence_text, side_name
from portllm.evaluating.decision import points_text
from portllm.evaluating.labels.counts import confusion
from portllm.evaluating.labels.page import confusion_section, label_section
from portllm.show.headline import Headline
from portllm.show.html.answered_rows import AnsweredRow, answered_rows
from portllm.show.html.bars import Row, dots
from portllm.show.html.figure import facts, figure, folded, side_by_side, table
from portllm.show.html.markup import Html, joined
from portllm.show.html.matrix import LABELS, matrix
from portllm.show.html.page import Tile, bullets, document, fragment, paragraph, section
from portllm.show.numbers import percent, points, upper_percent, upper_points

if TYPE_CHECKING:
    from portllm.certifying.certify import Chosen, Disagreement

OTHER_BOUNDS = (0.05, 0.02, 0.01, 0.005)
"""Bounds of which it is told how many inputs they take, beside the one that was asked for."""

CLOSE = 0.95
"""An expected share this near to the bound takes so many inputs that nobody has them."""

NOT_CLAIMED = (
    "That the ported model is good: the bound is relative to the old specialist, whatever its score.",
    "Anything about a single input, or about inputs from another source.",
    "Any loss other than that of correct answers: how confident a model is, how it words an answer, what it costs.",
    "Anything about other prompts, decoding settings or runtimes than those used here.",
)


def certify_page(
    certificate: Certificate,
    disagreements: "Sequence[Disagreement]",
    headline: Headline,
    *,
    chosen: "Chosen | None" = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """The page of one certificate.

    Args:
        certificate: As it was written.
        disagreements: The inputs whose answers differ, as text.
        headline: What follows from it, as from `decide`.
        chosen: All answers, where the models had to choose.
        about: What else is said at the top, such as the day.
    """
    title = f"{side_name(certificate.ported)} against {side_name(certificate.specialist)}"
    parts = [
        side_by_side(joined([*_shares(certificate), *_change(certificate)]), *_labels(chosen)),
        *_changed(certificate, chosen),
        *_texts(certificate, disagreements),
        *_claims(certificate),
        *_inputs(certificate),
        folded("All numbers", facts(certificate_facts(certificate)), bullets(certificate_notes(certificate))),
    ]
    told = _about(certificate) | dict(about or {})
    return document(title, headline, parts, about=told, tiles=list(_tiles(certificate)))


def notebook(certificate: Certificate) -> str:
    """What a notebook shows: what is claimed, and what was counted."""
    return fragment(decide(certificate), facts(certificate_facts(certificate)))


def _about(certificate: Certificate) -> dict[str, str]:
    known = certificate_facts(certificate)
    limit = "none given" if certificate.wanted is None else f"{points_text(certificate.wanted)} of accuracy"
    return {name: known[name] for name in ("old specialist", "ported", "inputs", "answers")} | {"limit": limit}


def _tiles(certificate: Certificate) -> Iterator[Tile]:
    """The bound, and what was counted."""
    if certificate.loss_bound is None or certificate.differing is None:
        return
    tone, said = decide(certificate).tone, ""
    if certificate.wanted is not None:
        verdict = {"good": "pass", "bad": "fail"}.get(tone, "open")
        said = f"{verdict}, limit: {points_text(certificate.wanted)}"
    bound = f"{upper_points(certificate.loss_bound)} points"
    yield Tile("Loses at most", bound, f"of accuracy, with {confidence_text(certificate)}", tone, said)
    n, labels = certificate.n, certificate.labels
    at_most = "of all inputs at most"
    if labels is not None:
        change = (labels.ported_right - labels.specialist_right) / n
        interval = f"{points(labels.change_low)} to {points(labels.change_high)}"
        now, before = (percent(right / n) for right in (labels.ported_right, labels.specialist_right))
        yield Tile("Change in accuracy", f"{points(change)} points", f"{confidence_text(certificate)} {interval}")
        yield Tile("Accuracy now", now, f"{before} before the update")
        yield Tile("Turned wrong", f"{labels.negative_flips:,} of {n:,}", f"{at_most} {upper_percent(labels.bound)}")
    if certificate.bound is not None:
        differ = f"{len(certificate.differing):,} of {n:,}"
        yield Tile("Answers differ", differ, f"{at_most} {upper_percent(certificate.bound)}")


def _labels(chosen: "Chosen | None") -> list[Html]:
    """What became of each label, where right answers are known."""
    if chosen is None or chosen.right is None:
        return []
    return [label_section(chosen.right, chosen.before, chosen.after, of="the ported model")]


def _changed(certificate: Certificate, chosen: "Chosen | None") -> list[Html]:
    """Which labels are confused; without right answers, which answers turned into which."""
    if chosen is None:
        return []
    choices = certificate.answers.choices
    if chosen.right is not None:
        answered = (chosen.right, chosen.before, chosen.after)
        return list(confusion_section(choices, *answered, of="the ported model"))
    if len(choices) > LABELS:
        return []
    said = "How often the ported model gives each answer where the old specialist gives another, or the same."
    counts = confusion(chosen.before, chosen.after)
    square = matrix(choices, counts, label="Answers before and now", corner="old specialist / ported")
    return [section("Which answers changed", paragraph(said, quiet=True), square, level=3)]


def _shares(certificate: Certificate) -> list[Html]:
    """What was counted, and up to where the share among all inputs may reach."""
    rows = []
    if certificate.differing is not None and certificate.bound is not None:
        rows.append(_share("answers differ", len(certificate.differing), certificate.bound, certificate.n))
    if certificate.labels is not None:
        labels = certificate.labels
        rows.append(_share("turned wrong", labels.negative_flips, labels.bound, certificate.n))
    if not rows:
        return []
    title = "How many answers differ"
    explained = (
        "Dot: the fraction of these inputs. Line: the upper bound on the fraction of all inputs, with "
        f"{confidence_text(certificate)}."
    )
    wanted = certificate.wanted
    axis = {} if wanted is None else {wanted: f"your limit: {percent(wanted, digits=2)}"}
    refused = None if wanted is None else (wanted, math.inf)
    told = "; ".join(f"{row.name}: {row.text}" for row in rows)
    numbers = [("", "counted"), *((row.name, row.text) for row in rows)]
    picture = dots(rows, title=title, told=told, axis=axis, unit="%", refused=refused)
    return [figure(title, explained, picture, numbers)]


def _share(name: str, k: int, bound: float, n: int) -> Row:
    return Row(name, k / n, f"{k} of {n}; at most {upper_percent(bound)}", 0.0, bound)


def _change(certificate: Certificate) -> list[Html]:
    labels = certificate.labels
    if labels is None:
        return []
    change = (labels.ported_right - labels.specialist_right) / certificate.n
    text = f"{points(change)} points ({points(labels.change_low)} to {points(labels.change_high)})"
    row = Row("ported minus old specialist", change, text, labels.change_low, labels.change_high, 2)
    title = "What the update cost"
    explained = (
        f"Change in accuracy over the same inputs; the line is the exact interval at {confidence_text(certificate)}."
    )
    wanted = certificate.wanted
    axis = {0.0: "no change"} if wanted is None else {-wanted: "your limit", 0.0: "no change"}
    refused = None if wanted is None else (-math.inf, -wanted)
    picture = dots([row], title=title, told=text, axis=axis, unit="points", refused=refused)
    numbers = [
        ("", "right"),
        ("old specialist", f"{labels.specialist_right} of {certificate.n}"),
        ("ported", f"{labels.ported_right} of {certificate.n}"),
        ("turned wrong", str(labels.negative_flips)),
        ("turned right", str(labels.positive_flips)),
        ("change", text),
    ]
    return [figure(title, explained, picture, numbers)]


def _claims(certificate: Certificate) -> Iterator[Html]:
    if certificate.loss_bound is None:
        return
    yield folded("What is claimed", paragraph(f"{claim(certificate)}."), paragraph(ASSUMES, quiet=True))
    yield folded("What is not claimed", bullets(NOT_CLAIMED))


def _inputs(certificate: Certificate) -> Iterator[Html]:
    """How many inputs other bounds take: if no answer differs, and if as many do as here."""
    if certificate.differing is None:
        return
    seen, confidence = len(certificate.differing) / certificate.n, certificate.confidence
    bounds = sorted({*OTHER_BOUNDS, *([certificate.wanted] if certificate.wanted is not None else [])}, reverse=True)
    head = ["bound", "inputs, if all answers agree"]
    head += [f"inputs, if {percent(seen)} of the answers differ"] if seen else []
    rows: list[tuple[str, ...]] = [tuple(head)]
    for bound in bounds:
        least = f"{least_inputs(0, bound, confidence=confidence):,}"
        rows.append((percent(bound, digits=2), least, *([_planned(bound, seen, confidence)] if seen else [])))
    said = (
        f"With {confidence_text(certificate)}; a plan for differing answers meets its bound with probability "
        f"{percent(POWER, digits=0)}. Another bound needs freshly drawn inputs; adding inputs until a bound is "
        "met invalidates it."
    )
    yield folded("Inputs needed for other bounds", table(rows, label="Inputs by bound"), paragraph(said, quiet=True))


def _planned(bound: float, expected: float, confidence: float) -> str:
    if expected >= bound:
        return "none: more answers differ than the bound allows"
    if expected > CLOSE * bound:
        return "too close to the bound"
    return f"{plan_inputs(bound, confidence=confidence, expected=expected).n_inputs:,}"


def _texts(certificate: Certificate, disagreements: "Sequence[Disagreement]") -> Iterator[Html]:
    if certificate.differing is None:
        return
    rows = []
    for found in disagreements:
        right = {} if found.right is None else {"right": found.right}
        answers = {"old specialist": found.before, "ported": found.after, **right}
        rows.append(AnsweredRow(found.row, found.prompt, answers))
    said = f"{len(certificate.differing)} of {certificate.n} inputs. Rows of the file are counted from 1."
    yield section("Answered otherwise", paragraph(said, quiet=True), answered_rows(rows))
