"""The answers that come with the program are those of the committed studies, of patches that both methods carried."""

from scripts.gather_answers import OUT, gather, render


def row(method, **given):
    return {
        "task": "labels",
        "evolution": "text",
        "link": 1,
        "method": method,
        "agreement": {"value": 0.75},
        "measured": {"sampled_drift": 0.01},
    } | given


def test_what_comes_with_the_program_is_what_the_committed_studies_say():
    assert OUT.read_text(encoding="utf-8") == render()


def test_a_patch_counts_where_both_methods_carried_it_and_its_answers_were_compared():
    whole = [row("add"), row("align", agreement={"value": 0.9}), row("distilled")]
    alone = [row("add", task="alone")]
    unknown = [row("add", task="unknown"), row("align", task="unknown", agreement=None)]
    written = [row("add", task="text"), row("align", task="text")]
    (cell,) = gather({"base": "m", "tasks": [*whole, *alone, *unknown, *written]}, ["text"])
    assert cell == {"base": "m", "patch": "labels on text.1", "drift": 0.01, "kept": {"add": 0.75, "align": 0.9}}
