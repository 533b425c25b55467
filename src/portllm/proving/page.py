"""A proof as a page. Pure."""

from collections.abc import Iterator

from portllm.proving.decision import decide, nats
from portllm.proving.proof import Proof
from portllm.proving.tables import proof_facts
from portllm.show.headline import Headline
from portllm.show.html.answered_rows import AnsweredRow, answered_rows
from portllm.show.html.bars import Row, bars
from portllm.show.html.figure import facts, figure, folded
from portllm.show.html.markup import Html
from portllm.show.html.page import Tile, document, fragment, paragraph, section


def prove_page(proof: Proof, headline: Headline) -> str:
    """The page of one proof.

    Args:
        proof: What was measured.
        headline: What follows from it, as from `decide`.
    """
    known = proof_facts(proof)
    about = {name: known[name] for name in ("base", "patch", "served")}
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
    return document(f"{proof.patch} in {proof.runtime}", headline, parts, about=about, tiles=list(_tiles(proof)))


def notebook(proof: Proof) -> str:
    """What a notebook shows."""
    return fragment(decide(proof), facts(proof_facts(proof)))


def _tiles(proof: Proof) -> Iterator[Tile]:
    passes = proof.error <= proof.tolerance
    yield Tile(
        "served patch off by",
        nats(proof.error),
        f"up to {nats(proof.tolerance)} passes",
        "good" if passes else "bad",
        "passes" if passes else "too far",
    )
    yield Tile("bare base off by", nats(proof.noise), "what the two runtimes differ by anyway")
    yield Tile("effect that arrives", f"{100 * proof.gain:.3g} %", f"of {nats(proof.effect)}")
    same = f"{proof.agreeing} of {len(proof.prompts)}"
    yield Tile("same next token as here", same, f"{proof.changed} changed by the patch, {proof.changed_here} here")


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
