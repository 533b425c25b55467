"""What became of several patches, as one table or one list."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from portllm.checking.verdict import Answer
from portllm.files.record import encode
from portllm.matching.carried_tokens import CarriedTokens
from portllm.matching.port_plan import PortPlan
from portllm.matching.quantized_base import quantization_of
from portllm.patch.folders import Outcome
from portllm.patch.patch import Patch
from portllm.patch.record import PortStep
from portllm.show.headline import Headline, command_line, headline_lines
from portllm.show.names import method_name
from portllm.show.numbers import counted, percent
from portllm.show.printable import one_line
from portllm.show.table import columns, items, table
from portllm.tensors.info import TensorInfo

SHOWN_TOKENS = 10

Carried = tuple[PortPlan, Patch[TensorInfo] | None]
"""A plan, and the ported patch where the plan was carried out."""


def render_port_outcomes(
    outcomes: Sequence[Outcome[Carried]], outputs: Sequence[Path], *, width: int | None = None
) -> str:
    """What `port` prints of several patches: a line for each, and why those that failed did."""
    rows = [("patch", "verdict", "modules", "drift", "output")]
    for outcome, output in zip(outcomes, outputs, strict=True):
        if outcome.value is None:
            rows.append((str(outcome.folder), "", "", "", "failed, see below"))
        else:
            rows.append((str(outcome.folder), *_facts(outcome.value[0]), str(output)))
    failed = [outcome for outcome in outcomes if outcome.error]
    first = next((outcome.value for outcome in outcomes if outcome.value), None)
    dry = first is not None and first[1] is None
    done = "Would port" if dry else "Ported"
    verdicts = Counter(verdict for verdict in (row[1] for row in rows[1:]) if verdict)
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    first_line = f"{done} {len(outcomes) - len(failed)} of {len(outcomes)} patches" + (f": {told}" if told else "")
    lines = [first_line + ("; why the others failed stands below." if failed else ".")]
    at = next((at for at, outcome in enumerate(outcomes) if outcome.value), None)
    if at is not None and not dry and first is not None:
        plan = first[0]
        models = ("--base", plan.source.name, "--patch", outcomes[at].folder, "--evolved", plan.target.name)
        measure = command_line("portllm", "evaluate", *models, "--ported", outputs[at], "--data", "TEST.jsonl")
        lines += ["Next: measure whether each still works:", f"  {measure}"]
    lines += ["", *columns(rows, width=width)]
    return "\n".join([*lines, *(f"{outcome.folder}: {one_line(str(outcome.error))}" for outcome in failed)])


def _facts(plan: PortPlan) -> tuple[str, str, str]:
    drift = plan.evidence.get("sampled_drift")
    modules = str(len(plan.patch.deltas) + len(plan.patch.experts))
    verdict = "not checked" if plan.choice is None else plan.choice.verdict
    return verdict, modules, "" if drift is None else percent(drift, digits=2)


def carried_to_json(carried: Carried, output: Path) -> dict[str, object]:
    """What `port --json` prints of one of several patches."""
    return {"output": str(output)} if carried[1] is None else ported_to_json(carried[1], output)


def ported_to_json(ported: Patch[TensorInfo], output: Path) -> dict[str, object]:
    """A ported patch as JSON values: where it is, and its record."""
    return {"output": str(output), "record": None if ported.record is None else encode(ported.record)}


def render_port(plan: PortPlan, out: Path, headline: Headline, step: PortStep | None) -> str:
    """What `port` prints of one patch; with `--dry-run`, without a step."""
    measured = _measured(step) if step is not None and "agreement" in step.evidence else {}
    facts = table(_plan_facts(plan, out) | measured)
    notes = [*items("note", plan.notes), *items("refused", plan.refusals)]
    return "\n".join([*headline_lines(headline), "", *facts, *notes])


def _plan_facts(plan: PortPlan, out: Path) -> dict[str, str]:
    rows = {
        "method": f"{plan.method.id}: {plan.method.summary}",
        "from": f"{plan.source.name} ({plan.source.fingerprint})",
        "to": f"{plan.target.name} ({plan.target.fingerprint})",
        "fit": f"{len(plan.patch.deltas) + len(plan.patch.experts)} modules, every tensor accounted for"
        if not plan.refusals or plan.choice is not None  # what was measured has been found to fit
        else "incompatible",
        "output": str(out),
    }
    if (scheme := quantization_of(plan.patch)) is not None:
        first = plan.patch.record.ports[0].source if plan.patch.record and plan.patch.record.ports else plan.source
        rows["fitted to"] = f"the weights of {first.name} in {scheme}; merging adds back their quantization error"
    if plan.choice is not None:
        pass  # the reasons say how far the weights drifted
    elif "sampled_drift" in plan.evidence:
        rows["drift"] = (
            f"{percent(plan.evidence['sampled_drift'], digits=2)} of the patched weights' norm, cosine "
            f"{plan.evidence['sampled_cosine']:.5f} (estimated from samples)"
        )
    elif plan.source.fingerprint == plan.target.fingerprint:
        rows["drift"] = "none: the evolved model is the base"
    elif plan.base is None:
        rows["drift"] = "not measured: with --base it is, and later checks of the ported patch count it"
    if plan.tokens is not None:
        gone = list(plan.tokens.gone.values())
        are = "is" if len(gone) == 1 else "are"
        lost = f"{counted(len(gone), 'token')} of the base {are} missing: {shown_tokens(gone)}"
        rows["tokens"] = (
            f"{counted(plan.tokens.n_moved, 'token')} moved to another row; {lost if gone else 'none is missing'}"
        )
    if plan.carried_tokens is not None:
        rows["own tokens"] = _own_tokens(plan.carried_tokens)
    return rows


def _measured(step: PortStep) -> dict[str, str]:
    """What was measured of a ported patch on prompts."""
    found = step.evidence
    ported, added = (_interval(found, name) for name in ("agreement", "agreement_added"))
    drawn = "drawn " if "prompts_drawn" in found else ""
    rows = {
        "ported by": step.method,
        "agreement": f"{ported} of the old specialist's answers; by addition {added}",
        "": f"on {found['prompts_report']:.0f} {drawn}prompts that nothing was fitted or chosen on",
    }
    if "token_agreement" in found:
        ported, added = (_interval(found, name) for name in ("token_agreement", "token_agreement_added"))
        rows["token by token"] = f"{ported} of the tokens of its answers, given those before; by addition {added}"
    rows |= {
        "divergence": f"{found['divergence']:.4f} nats per token; by addition {found['divergence_added']:.4f}",
    }
    if step.tried:
        dear = sum(each.is_too_dear for each in step.tried)
        left_out = f", of which {dear} cost too much on general text" if dear else ""
        rows["tried"] = f"{len(step.tried)} candidates{left_out}; README.md and patch.json list them"
    if "loss" in found:
        rows["loss"] = (
            f"{found['loss_ported']:.3f} nats per token of the right answers of {found['loss_rows']:.0f} rows, by "
            f"which it was chosen; by addition {found['loss_added']:.3f}, the old specialist {found['loss']:.3f}"
        )
    if "left_out" in found:
        rows["not carried"] = (
            f"at most {percent(found['misread'], digits=2)} of what a module's A reads, and "
            f"{percent(found['left_out'], digits=2)} of its B, for want of tokens or of likeness"
        )
    if "general_nats" in found:
        beyond = found["general_nats_ported"] - found["general_nats_added"]
        rows["general text"] = (
            f"{found['general_nats_ported']:.3f} nats per token; beyond addition {beyond:+.3f} ± "
            f"{found['general_nats_error']:.3f} (standard error, {found['general_nats_rows']:.0f} rows); the evolved "
            f"model {found['general_nats']:.3f}"
        )
    return rows


def judged_by(found: Mapping[str, float]) -> tuple[str, str]:
    """The measure that `--agreement` is a limit for, and what it is a share of.

    Example:
        >>> judged_by({"agreement": 0.3, "token_agreement": 0.95})
        ('token_agreement', "the old answers' tokens")
    """
    if "token_agreement" in found:
        return "token_agreement", "the old answers' tokens"
    return "agreement", "the old answers"


def _interval(found: Mapping[str, float], name: str) -> str:
    low, high = (percent(found[f"{name}_{side}"], digits=1) for side in ("low", "high"))
    return f"{percent(found[name], digits=1)} (95 % interval {low} to {high})"


def shortfall(name: str, step: PortStep, wanted: float) -> str | None:
    """What to say where a ported patch was found to have fewer of the old specialist's answers than are wanted."""
    share, of = judged_by(step.evidence)
    high = step.evidence.get(f"{share}_high")
    if high is None or high >= wanted:
        return None
    taken = "add" if step.method == "align" else step.method.removeprefix("align: ")
    distance = next((each.mean for each in step.tried if each.name == taken), 0.0)
    nearer = [
        (each.general_nats or 0.0) + (each.general_error or 0.0)
        for each in step.tried
        if each.is_too_dear and each.mean < distance
    ]
    if nearer:
        best = (
            f"{counted(len(nearer), 'candidate')} would come nearer, but cost {min(nearer):.2f} nats or more per token "
            "of general text beyond addition, standard error included (--max-general-loss)"
        )
    elif step.method == "align":
        best = "nothing helps more than addition"
    else:
        best = f"'{step.method}' is the best that was tried"
    return (
        f"{name}: has fewer of {of} than {percent(wanted, digits=1)}: at most "
        f"{percent(high, digits=1)}; {best}. Refresh it from the old specialist (docs/refresh.md), or train again."
    )


def trained_tokens_lost(plan: PortPlan) -> list[str]:
    """Tokens whose rows were trained one by one, and that the evolved model does not have."""
    gone = {} if plan.tokens is None else plan.tokens.gone
    return [gone[row] for row in sorted({row for rows in plan.patch.rows.values() for row in rows.rows}) if row in gone]


def shown_tokens(tokens: Sequence[str]) -> str:
    """The first of some tokens, and how many more there are."""
    more = f" and {len(tokens) - SHOWN_TOKENS} more" if len(tokens) > SHOWN_TOKENS else ""
    return ", ".join(map(repr, tokens[:SHOWN_TOKENS])) + more


def _own_tokens(carried: CarriedTokens) -> str:
    """Where the tokens that only the patch has have gone."""
    parts = []
    for tokens, what in (
        ([token for token in carried.added if token not in carried.existing], "appended to the evolved vocabulary"),
        ([token for token in carried.added if token in carried.existing], "given the evolved model's rows"),
    ):
        shown = ", ".join(f"{token!r} (row {carried.added[token]})" for token in tokens[:SHOWN_TOKENS])
        more = f" and {len(tokens) - SHOWN_TOKENS} more" if len(tokens) > SHOWN_TOKENS else ""
        parts += [f"{shown}{more} {what}"] if tokens else []
    return "; ".join([*parts, f"{carried.n_rows} rows: resize the evolved model to these before PEFT loads the patch"])


def port_warnings(plan: PortPlan, *, judged: bool) -> Iterator[str]:
    """What to say on stderr: of a patch that changes nothing, of tokens that are lost, and of what may not hold.

    Args:
        plan: What is to be done.
        judged: Whether the last is said too; of a single patch, the first line of the result says it.
    """
    if plan.refusals:
        return
    if plan.nothing is not None:
        yield f"warning: {plan.nothing}"
    if plan.tokens is not None and (lost := trained_tokens_lost(plan)):
        yield (
            f"warning: {plan.patch.name}: trained rows of {shown_tokens(lost)} are left out: {plan.target.name} has no "
            "such tokens. To keep them, add the tokens to its tokenizer, resize it, and port again."
        )
    if judged and plan.nothing is None and plan.choice is not None and plan.choice.verdict != Answer.HOLDS:
        how = f" and was ported by {method_name(plan.method.id)}" if plan.choice.verdict == Answer.HOLDS_ALIGNED else ""
        yield (
            f"warning: {plan.patch.name}: {plan.choice.verdict}{how}; measure the ported patch with 'portllm evaluate'."
        )
