"""The command port."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli.options import (
    MODEL,
    PATCHES,
    DryRunOption,
    JsonOption,
    OtherBaseOption,
    OutOption,
    OverwriteOption,
)
from portllm.cli.terminal import print_json, say


def port(
    patches: Annotated[
        list[Path], typer.Argument(metavar="PATCH", help=f"{PATCHES} One without a record needs --base.")
    ],
    evolved: Annotated[str, typer.Option("--evolved", help=f"The model to carry it to. {MODEL}")],
    output: OutOption,
    base: Annotated[str | None, typer.Option("--base", help="The model the patch belongs to.")] = None,
    method: Annotated[
        str, typer.Option("--method", help="'add' takes the delta as it is; 'auto' asks check, needs --base.")
    ] = "add",
    force: Annotated[bool, typer.Option("--force", help="With --method auto: port what will not hold.")] = False,
    allow_other_base: OtherBaseOption = False,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Carry patches over to an evolved model; they stay adapters. Reads headers and samples.

    Weights are read only of tensors that a patch holds whole; these need --base. With --method auto a few megabytes of
    both models are read as by check: what will not hold is refused, what is uncertain is ported with a warning. Several
    patches go each to a subfolder of the output, named like its own folder; one that fails does not stop the others.
    """
    from portllm.checkpoint.open import open_checkpoint
    from portllm.matching.update import Update
    from portllm.patch.folders import each, find_patches, open_each
    from portllm.porting.auto import AUTO, Route
    from portllm.porting.port import require_port, run_port
    from portllm.porting.text import (
        port_outcomes_to_json,
        port_warning,
        ported_to_json,
        render_port_outcomes,
        render_port_plan,
    )

    if force and method != AUTO:
        raise typer.BadParameter("--force goes with --method auto; a method that is named ports whatever fits.")
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base)
    found = find_patches(patches)
    outputs = found.outputs(output)
    planned = open_each(found, lambda patch, _: route.plan(patch))
    plans = {out: outcome.value for out, outcome in zip(outputs, planned, strict=True) if outcome.value is not None}
    for plan in plans.values():
        if warning := port_warning(plan):
            say(warning, err=True)
        if found.is_single and not as_json:
            say(render_port_plan(plan, output))
    run = require_port if dry_run else run_port
    done = each(plans, lambda out, plan: run(plan, out, overwrite=overwrite))
    outcomes = [outcome.followed_by(done.get(out)) for out, outcome in zip(outputs, planned, strict=True)]
    if found.is_single:
        _, ported = outcomes[0].result()
        if as_json and ported is not None:
            print_json(ported_to_json(ported, output))
        return
    if as_json:
        print_json(port_outcomes_to_json(outcomes, outputs))
    else:
        say(render_port_outcomes(outcomes, outputs))
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)
