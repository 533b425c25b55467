"""What `combine` says first: what the sum left out, and the command that follows. Pure."""

from collections.abc import Sequence

from portllm.combining.plan import CombineReport
from portllm.show.headline import Headline, command_line
from portllm.show.names import patch_name, short_name
from portllm.show.numbers import percent

MUCH = 0.05
"""Of the combined deltas; what is cut off beyond it deserves a word."""


def decide(report: CombineReport, patches: Sequence[str], output: str) -> Headline:
    """The sentence to act on.

    Args:
        report: What `combine` did.
        patches: What went in, as the user calls it.
        output: Where the result is.
    """
    *others, last = map(patch_name, patches)
    base, cut = report.record.base.name, report.truncation_residual
    text = f"Combined {', '.join(others)} and {last} into one patch of {short_name(base)}"
    method = str(report.record.capture.settings["method"]).partition("-")[0]
    if method != "concatenate":
        text += f" by {method.upper()}"
    elif not cut:
        text += ", their exact sum"
    if cut:
        text += f"; {percent(cut)} of its size was cut off with the rank"
    measure = ("--base", base, "--patch", patches[0], "--evolved", base, "--ported", output)
    return Headline(
        "doubt" if cut > MUCH else "good",
        f"{text}.",
        (),
        f"measure what {patch_name(patches[0])} still does beside the others, then each of these likewise",
        command_line("portllm", "evaluate", *measure, "--data", "TEST.jsonl"),
    )
