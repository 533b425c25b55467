"""What `merge` says first: whether the merged weights hold the patch, and the command that follows. Pure."""

from dataclasses import dataclass

from portllm.merging.manifest import MergeReport
from portllm.patch.record import PatchRecord
from portllm.show.headline import Headline, command_line
from portllm.show.names import patch_name, short_name
from portllm.show.numbers import counted, percent

ENOUGH = 0.99
"""Of the patch that survives rounding, below which there is something to be done."""


@dataclass(frozen=True, slots=True)
class Named:
    """What the user calls what was merged, for the command that comes next."""

    patch: str
    into: str
    output: str


def decide(report: MergeReport, named: Named, *, record: PatchRecord | None = None) -> Headline:
    """The sentence to act on.

    Args:
        report: What the merge did.
        named: Names for the next command.
        record: That of the patch, which says what it was ported from.
    """
    where = "in place" if report.headers else f"into {short_name(named.into)}"
    text = f"Merged {patch_name(named.patch)} {where}"
    total, gap = report.total, report.quantization
    if total.delta_sq == 0:
        return Headline("doubt", f"{text}, which changed nothing: all deltas of the patch are zero.")
    kept, stored = percent(total.kept_gain), "/".join(report.dtype)
    if gap is not None and gap.dominates:
        reason = (
            "The merge adds back far more quantization error than patch, and the patch was trained without it. Models "
            "merged this way have been seen to break."
        )
        whole = ("portllm", "merge", named.patch, "--into", "QUANTIZED", "--dtype", "BF16", "-o", "OUTPUT")
        return Headline(
            "bad",
            f"{text}, but what was merged is not the model that the patch was trained on.",
            [reason],
            "serve the adapter on the quantized model, or merge into the dequantized values of that model",
            command_line(*whole),
        )
    if report.rounding == "nearest" and min(_least(report), total.kept_gain) < ENOUGH:
        reason = (
            f"Rounding to {stored} loses changes smaller than half a step; {percent(_least(report))} survives in the "
            "worst tensor. The unmerged adapter loses nothing."
        )
        return Headline(
            "doubt",
            f"{text}; only {kept} of the patch survives rounding to {stored}.",
            [reason],
            "serve the adapter, or merge it again in a wider dtype (or with --rounding stochastic)",
            command_line("portllm", "merge", named.patch, "--into", named.into, "--dtype", "F32", "-o", "OUTPUT"),
        )
    text += f"; {kept} of the patch survives rounding to {stored}."
    if report.headers:
        undo = command_line("portllm", "merge", "--undo", named.output)
        return Headline("good", text, (), f"serve {named.output}; should it not serve you well, undo the merge", undo)
    return Headline("good", text, (), "measure it beside the adapter, then serve it", _evaluate(named, record))


def decide_all(done: int, of: int, *, dry: bool, output: str) -> Headline:
    """The sentence to act on, of several patches."""
    text = f"{'Would merge' if dry else 'Merged'} {done} of {counted(of, 'patch', 'patches')}"
    if done < of:
        return Headline("bad", f"{text}; why the others failed stands below.")
    if dry:
        return Headline("good", f"{text}.")
    return Headline("good", f"{text}, each into weights of its own.", (), f"serve those below {output}")


def _least(report: MergeReport) -> float:
    return report.tensors[report.worst].kept_gain if report.worst is not None else 1.0


def _evaluate(named: Named, record: PatchRecord | None) -> str:
    ported = record is not None and bool(record.ports)
    base = record.ports[0].source.name if record is not None and ported else named.into
    patch = "PATCH" if ported else named.patch
    models = ("--base", base, "--patch", patch, "--evolved", named.into, "--ported", named.patch)
    return command_line("portllm", "evaluate", *models, "--merged", named.output, "--data", "TEST.jsonl")
