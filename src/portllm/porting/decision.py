"""What `port` says first: what was ported, what speaks for it and against it, and the command that follows. Pure."""

from dataclasses import dataclass

from portllm.checking.verdict import Answer
from portllm.matching.port_plan import PortPlan
from portllm.patch.record import PortStep
from portllm.porting.text import judged_by, shown_tokens, trained_tokens_lost
from portllm.show.headline import Headline, Tone, command_line
from portllm.show.names import method_name, patch_name, short_name
from portllm.show.numbers import percent


@dataclass(frozen=True, slots=True)
class Named:
    """What the user calls what was ported, for the command that comes next."""

    base: str
    patch: str
    evolved: str
    ported: str


def decide(plan: PortPlan, step: PortStep | None, *, wanted: float, named: Named) -> Headline:
    """The sentence to act on.

    Args:
        plan: What was planned.
        step: What was measured; None where nothing was carried out.
        wanted: The share of the old specialist's answers that the port is to give, where prompts were read; of their
            tokens, where they are written.
        named: Names for the next command.
    """
    done = "Would port" if step is None else "Ported"
    method = method_name(plan.method.id)
    text = f"{done} {patch_name(plan.patch.name)} to {short_name(plan.target.name)} by {method}"
    tone, said = _judged(plan, step, wanted)
    lost = trained_tokens_lost(plan)
    if lost and tone in ("good", "plain"):
        tone, said = "doubt", f", without the trained rows of {shown_tokens(lost)}{said}"
    next_, command = ("", "") if step is None else _next(tone, named, measured="agreement" in step.evidence)
    reasons = () if plan.choice is None else plan.choice.findings
    return Headline(tone, f"{text}{said}.", reasons, next_, command)


def _judged(plan: PortPlan, step: PortStep | None, wanted: float) -> tuple[Tone, str]:
    """By what was measured on prompts, else by what `check` says of the weights, else not at all."""
    found = {} if step is None else step.evidence
    if "agreement" in found:
        share, of = judged_by(found)
        low, high = found[f"{share}_low"], found[f"{share}_high"]
        tone: Tone = "good" if low >= wanted else "bad" if high < wanted else "doubt"
        enough = {"good": "enough", "bad": "too few", "doubt": "not shown to be enough"}[tone]
        return tone, (
            f"; it gives {percent(found[share])} of {of} ({percent(low)} to {percent(high)}) on "
            f"{found['prompts_report']:.0f} prompts that it was not fitted on; {enough} by the limit of "
            f"{percent(wanted, digits=0)} (--agreement)"
        )
    if plan.choice is None:
        return "plain", "; whether it holds was not checked"
    match plan.choice.verdict:
        case Answer.HOLDS:
            return "good", ", which is known to hold for so short an update"
        case Answer.HOLDS_ALIGNED:
            return "doubt", "; only a port by align is known to hold this far, so measure it before you ship it"
        case Answer.UNCERTAIN:
            return "doubt", "; whether it holds is uncertain, so measure it before you ship it"
        case verdict:
            return "bad", f" by force: it {verdict}"


def _next(tone: Tone, named: Named, *, measured: bool) -> tuple[str, str]:
    if tone == "good":
        into = ("--into", named.evolved, "-o", "MERGED")
        return "serve the adapter, or merge it", command_line("portllm", "merge", named.ported, *into)
    if tone == "bad" and measured:
        old = ("--teacher", named.patch, "--teacher-base", named.base, "--data", "PROMPTS.jsonl", "-o", "OUTPUT")
        train = command_line("portllm", "train", "--base", named.evolved, *old)
        return "train it again, on its own data or from the old patch's answers", train
    models = ("--base", named.base, "--patch", named.patch)
    after = ("--evolved", named.evolved, "--ported", named.ported, "--data", "TEST.jsonl")
    return "measure whether it still works", command_line("portllm", "evaluate", *models, *after)
