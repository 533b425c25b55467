"""A proof as a page. Pure."""

from portllm.proving.decision import decide, nats
from portllm.proving.proof import Proof
from portllm.proving.tables import proof_facts
from portllm.show.headline import Headline
from portllm.show.html.answered_rows import AnsweredRow, answered_rows
from portllm.show.html.bars import Row, bars
from portllm.show.html.figure import facts, figure, folded
from portllm.show.html.markup import Html
from portllm.show.html.page import document, fragment, paragraph, section


def prove_page(proof: Proof, headline: Headline) -> str:
    """The page of one proof.

    Args:
        proof: What was measured.
        headline: What follows from it, as from `decide`.
    """
    known = proof_facts(proof)
    changed = [
        AnsweredRow(number, each.prompt, {"base": each.base, "patch": each.patch, "expected": each.expected})
        for number, each in enumerate(proof.prompts, start=1)
        if len({each.base, each.patch, each.expected}) > 1
    ]
    said = f"{len(changed)} of {len(proof.prompts)} prompts, with the likeliest token after each."
    parts = [
        _distances(proof),
        section("Where the next token differs", paragraph(said, quiet=True), answered_rows(changed)),
        folded("All numbers", facts(known)),
    ]
    told = {name: known[name] for name in ("base", "patch", "served")}
    return document(f"{proof.patch} in {proof.runtime}", headline, parts, about=told)


def notebook(proof: Proof) -> str:
    """What a notebook shows."""
    return fragment(decide(proof), facts(proof_facts(proof)))


def _distances(proof: Proof) -> Html:
    """How far each is from what it should be, on one scale."""
    null = sum(proof.null_errors) / len(proof.null_errors)
    rows = [
        Row(name, value, nats(value))
        for name, value in (
            ("served patch", proof.error),
            ("bare base", proof.noise),
            ("no patch", proof.effect),
            ("random patches", null),
        )
    ]
    title = "How far log-probabilities are off"
    explained = (
        "Against transformers in float32. The served patch may be as far off as the bare base is; a patch that is not "
        "there, or a random one of the same size, is as far off as the bars below."
    )
    told = "; ".join(f"{row.name}: {row.text}" for row in rows)
    picture = bars(rows, title=title, told=told, unit="nats", axis={proof.tolerance: "passes"})
    return figure(title, explained, picture, [("", "off by"), *((row.name, row.text) for row in rows)])
