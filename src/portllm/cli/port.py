"""The command port."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.data import CompletionOption, PromptOption, given_prompt
from portllm.cli.numbers import real, share, whole
from portllm.cli.terminal import print_json, say, width_of


def port(
    patches: Annotated[
        list[Path],
        typer.Argument(metavar="PATCH", help=f"{options.PATCHES} An adapter without patch.json needs --base."),
    ],
    evolved: Annotated[str, typer.Option("--evolved", help=f"The updated base to port to. {options.MODEL}")],
    output: options.Out,
    base: Annotated[str | None, typer.Option("--base", help="The model the patch was made on.")] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Port method: add carries the delta over unchanged; align fits it to the evolved model on prompts; "
            "transport takes it to a model with other units or another basis (both need --base and --text or --draw); "
            "auto chooses from what check finds (needs --base).",
        ),
    ] = "add",
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="With --method align or transport: unlabeled prompts from the patch's domain, better 256 (.jsonl, or "
            ".txt with one per line).",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="With --method align or transport: rows with right answers. The choice is made by the loss on those "
            "that are not fitted on, not by the old specialist's answers. Without --text, their prompts are used too.",
        ),
    ] = None,
    draw: Annotated[
        int | None,
        typer.Option(
            "--draw",
            parser=whole(),
            help="Instead of --text: the old specialist draws this many prompts itself, better 256, through the prompt "
            "template.",
        ),
    ] = None,
    prompt: PromptOption = None,
    completion: CompletionOption = None,
    anchors: Annotated[
        Path | None,
        typer.Option(
            "--anchors",
            help="With --text: general text on which the evolved model is to stay as it is (.txt, one text per line). "
            "Defaults to text that it writes itself.",
        ),
    ] = None,
    agreement: Annotated[
        float,
        typer.Option(
            "--agreement",
            parser=share,
            help="With --text: the share of answers that are to be the old specialist's, or of their tokens where "
            "answers have more than 8 on average; exits with 3 if the ported patch is found to have fewer.",
        ),
    ] = 0.9,
    max_general_loss: Annotated[
        float,
        typer.Option(
            "--max-general-loss",
            parser=real(least=0.0),
            help="With --text: nats per token of general text that an aligned port may cost beyond addition, "
            "standard error included; what costs more is not taken, however near it comes.",
        ),
    ] = 0.05,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", parser=whole(), help="With --text: maximum tokens of an answer.")
    ] = 32,
    max_tokens: Annotated[
        int,
        typer.Option(
            parser=whole(least=2),
            help="With --text: maximum tokens per prompt and answer; longer prompts are cut from the left.",
        ),
    ] = 512,
    batch_size: Annotated[int, typer.Option(parser=whole(), help="With --text: prompts per forward pass.")] = 16,
    device: options.Device = options.DeviceName.AUTO,
    force: Annotated[
        bool, typer.Option("--force", help="With --method auto: port even if check says the patch will not hold.")
    ] = False,
    allow_other_base: options.OtherBase = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Port patches to an evolved model. They stay adapters; only headers and samples are read.

    Weights are read only for tensors that a patch stores in full; these need --base. --method auto reads a few
    megabytes of both models, as check does: a patch that will not hold is refused, one that is not known to hold by
    addition is ported with a warning. --method align runs both models on unlabeled prompts, one layer at a time
    (docs/methods/align.md); with auto and --text, only if addition does not keep enough of the answers. --method
    transport does so for a model that computes much the same with other units (docs/methods/transport.md). Several
    patches each get a subfolder of the output; one that fails does not stop the others.
    """
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.matching.port_plan import PortPlan
    from portllm.matching.update import Update
    from portllm.patch.folders import each, find_patches, open_each, outcomes_to_json
    from portllm.patch.patch import Patch
    from portllm.porting.auto import AUTO, Route
    from portllm.porting.decision import Named, decide
    from portllm.porting.port import require_port, run_port
    from portllm.porting.text import (
        carried_to_json,
        port_warnings,
        ported_to_json,
        render_port,
        render_port_outcomes,
        shortfall,
        trained_tokens_lost,
    )
    from portllm.probing.domain import Asking, domain_of
    from portllm.tensors.info import TensorInfo

    if force and method != AUTO:
        raise typer.BadParameter("--force requires --method auto; any other method ports whatever is compatible.")
    asking = Asking(
        text=text,
        data=data,
        draw=draw,
        template=given_prompt(prompt, None),
        completion=completion,
        anchors=anchors,
    )
    if not asking.is_given and any(given is not None for given in (prompt, completion, anchors)):
        raise typer.BadParameter("--prompt, --completion and --anchors require --text, --data or --draw.")
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(
        update, method=method, force=force, allow_other_base=allow_other_base, reads=method == AUTO and asking.is_given
    )
    found = find_patches(patches)
    outputs = found.outputs(output)
    planned = open_each(found, lambda patch, _: route.plan(patch))
    is_told_apart = as_json or not found.is_single  # what the first line of a single patch says
    plans = {out: outcome.value for out, outcome in zip(outputs, planned, strict=True) if outcome.value is not None}
    for plan in plans.values():
        for warning in port_warnings(plan, judged=is_told_apart):
            say(warning, err=True)
    with shown_progress(quiet=quiet) as progress:

        def run(out: Path, plan: PortPlan) -> Patch[TensorInfo] | None:
            domain = None
            if asking.is_given:
                domain = domain_of(
                    plan,
                    asking,
                    max_tokens=max_tokens,
                    answer_tokens=answer_tokens,
                    most_nats=max_general_loss,
                    wanted=agreement if method == AUTO else None,
                    batch_size=batch_size,
                    device=device.value,
                    progress=progress,
                )
            run_or_check = require_port if dry_run else run_port
            return run_or_check(plan, out, overwrite=overwrite, domain=domain)

        done = each(plans, run)
    outcomes = [outcome.followed_by(done.get(out)) for out, outcome in zip(outputs, planned, strict=True)]
    ported = [outcome.value[1] for outcome in outcomes if outcome.value is not None]
    steps = {patch.name: patch.record.ports[-1] for patch in ported if patch is not None and patch.record is not None}
    if found.is_single:
        plan, only = outcomes[0].result()
        step = next(iter(steps.values()), None)
        headline = decide(
            plan,
            step,
            wanted=agreement,
            named=Named(base or plan.source.name, str(patches[0]), evolved, str(output)),
        )
        if as_json and only is not None:
            print_json(ported_to_json(only, output))
        elif not as_json:
            say(render_port(plan, output, headline, step), tone=headline.tone)
    elif as_json:
        print_json(outcomes_to_json(outcomes, outputs, carried_to_json))
    else:
        say(render_port_outcomes(outcomes, outputs, width=width_of(sys.stdout)))
    short = [said for name, step in steps.items() if (said := shortfall(name, step, agreement)) is not None]
    for said in short if is_told_apart else ():
        say(said, err=True)
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)
    if short or any(map(trained_tokens_lost, plans.values())):
        raise typer.Exit(3)
