"""What `check` says first: whether to port a patch as it is, why, and the command that follows. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checking.answers import Answers
from portllm.checking.forecast_model import Expected
from portllm.checking.report import CheckReport, PatchReport
from portllm.checking.tables import verdict_counts
from portllm.checking.verdict import Answer, Reason
from portllm.show.headline import Headline, Tone, command_line
from portllm.show.names import method_name, patch_name, short_name
from portllm.show.numbers import percent

TONES: Mapping[Answer, Tone] = {
    Answer.HOLDS: "good",
    Answer.HOLDS_ALIGNED: "doubt",
    Answer.UNCERTAIN: "doubt",
    Answer.WILL_NOT_HOLD: "bad",
    Answer.CANNOT_BE_PORTED: "bad",
}

ACTIONS: Mapping[Answer, str] = {
    Answer.HOLDS: "port it as it is",
    Answer.HOLDS_ALIGNED: "port it by align, on prompts of its own kind",
    Answer.UNCERTAIN: "measure it before you ship it",
    Answer.WILL_NOT_HOLD: "fit it to the new base, or train it again",
    Answer.CANNOT_BE_PORTED: "train it again, or remove what is in the way",
}

OTHER_INPUT = "pass what the reasons below name"
"""What to do where a model that was given is at fault, and not the patch: training again would not help."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the user calls the models, for the command that comes next."""

    base: str
    evolved: str


def decide(patch: PatchReport, evolved: str, *, checked: Checked | None = None, thresholds: bool = False) -> Headline:
    """The sentence to act on, for one patch.

    Args:
        patch: What `check` found of it.
        evolved: The name of the evolved model.
        checked: Names for the next command; without them there is none.
        thresholds: Whether each reason says which threshold decided, and who measured it.
    """
    answer = patch.verdict.answer
    reasons = [_reason(reason) if thresholds else reason.text for reason in patch.verdict.reasons]
    if patch.forecast is not None:
        reasons.append(_forecast(patch.forecast))
    if patch.answers is not None:
        reasons.append(_answers(patch.answers))
    reasons += [f"Note: {remark}." for remark in patch.verdict.remarks]
    other_input = any(reason.is_of_input for reason in patch.verdict.reasons)
    action = OTHER_INPUT if other_input else ACTIONS[answer]
    next_, command = ("", "") if checked is None or other_input else _next(patch, checked)
    named = f"{patch_name(patch.name)} on {short_name(evolved)}"
    return Headline(TONES[answer], f"{answer}: {named}; {action}", reasons, next_, command)


def decide_all(report: CheckReport, *, failed: bool = False, checked: Checked | None = None) -> Headline:
    """How many patches have which verdict, in the tone of the worst.

    Args:
        report: What `check` found.
        failed: Whether some patches could not be opened.
        checked: Names for the next command; without them there is none.
    """
    order = list(Answer)
    worst = max((patch.verdict.answer for patch in report.patches), key=order.index, default=None)
    tone: Tone = "bad" if failed else "plain" if worst is None else TONES[worst]
    text = verdict_counts(report) if report.patches else "no patches"
    reasons = [] if worst is None else _in_common(report)
    if checked is None or worst is None:
        return Headline(tone, text, reasons)
    chosen = [patch for patch in report.patches if patch.verdict.answer is worst]
    if any(reason.text.startswith("--") for reason in chosen[0].verdict.reasons):
        return Headline(tone, text, reasons, OTHER_INPUT.replace("below", "in the table"))
    next_, command = _next(chosen[0], checked)
    return Headline(tone, text, reasons, f"{next_}; likewise the others" if len(chosen) > 1 else next_, command)


def _in_common(report: CheckReport) -> list[str]:
    """A reason that every patch has, so that it need not stand in each row."""
    reasons = [patch.verdict.reasons[0].text if patch.verdict.reasons else "" for patch in report.patches]
    return reasons[:1] if reasons[0] and len({*reasons}) == 1 and len(reasons) > 1 else []


def _reason(reason: Reason) -> str:
    decided = reason.threshold
    return reason.text + (
        "" if decided is None else f" (Threshold: {decided.name}, {decided.value:g}; {decided.source}.)"
    )


def _forecast(expected: Expected) -> str:
    """What patches kept on like updates: the target that kept less comes first."""
    told = ", ".join(
        f"{percent(said.retention, digits=0)} in {target} ({percent(said.low, digits=0)} to "
        f"{percent(said.high, digits=0)})"
        for target, said in sorted(expected.forecasts.items(), key=lambda item: item[1].low)
    )
    return f"If it goes as on updates of {expected.shipped.base}, it keeps of retraining's gain: {told}."


def _answers(seen: Answers) -> str:
    """How many of the old answers ports kept on like updates, by method."""
    told = " and ".join(
        f"{percent(mean, digits=0)} by {method_name(method)} ({percent(least, digits=0)} at least)"
        for method, (least, mean) in seen.kept.items()
    )
    cases = f"In {seen.n} cases on {', '.join(seen.bases)}, with updates about as large"
    return f"{cases}, ports kept of the old answers: {told}."


def _next(patch: PatchReport, checked: Checked) -> tuple[str, str]:
    """The port by the method that the verdict names, or a new training from the old patch's answers."""
    models = ("--base", checked.base, "--evolved", checked.evolved)
    match patch.verdict.method:
        case None:
            again = ("--base", checked.evolved, "--teacher", patch.name, "--teacher-base", checked.base)
            train = command_line("portllm", "train", *again, "--data", "INPUTS.jsonl", "-o", "OUTPUT")
            return "train it on its own data, or from the old patch's answers", train
        case "align" | "transport" as method:
            fitted = ("--method", method, "--text", "PROMPTS.jsonl", "-o", "PORTED")
            said = f"port it by {method}, which measures what it keeps, then measure the loss with portllm evaluate"
            return said, command_line("portllm", "port", patch.name, *models, *fitted)
        case _:
            return "port it", command_line("portllm", "port", patch.name, *models, "-o", "PORTED")
