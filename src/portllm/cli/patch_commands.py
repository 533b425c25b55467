"""Commands that read headers and samples: inspect, port."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.main import (
    MODEL,
    PATCHES,
    DryRunOption,
    JsonOption,
    OtherBaseOption,
    OutOption,
    OverwriteOption,
    QuietOption,
)
from portllm.cli.plain import print_json, say

if TYPE_CHECKING:
    from portllm.checkpoint.header import TensorInfo
    from portllm.patch.patch import Patch
    from portllm.pipeline.plan import PortPlan


def inspect(
    path: Annotated[str, typer.Argument(help=f"A checkpoint, adapter or patch. {MODEL}")],
    digest: Annotated[bool, typer.Option("--digest", help="Read all bytes of a checkpoint for its digest.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """What a checkpoint, adapter or patch is: identity, family, modules, ranks, scales, size."""
    from portllm.cli.progress import shown_progress
    from portllm.cli.render import render_summary
    from portllm.pipeline.inspect import inspect as inspect_path
    from portllm.pipeline.inspect import summary_to_json

    with shown_progress(quiet=quiet) as progress:
        summary = inspect_path(path, with_digest=digest, progress=progress)
    if as_json:
        print_json(summary_to_json(summary))
    else:
        say(render_summary(summary))


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
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free
    from portllm.cli.render import port_warning, render_port_plan
    from portllm.cli.render_several import port_outcomes_to_json, ported_to_json, render_port_outcomes
    from portllm.patch.adapter_folder import load_patch
    from portllm.patch.folders import find_patches, open_each
    from portllm.pipeline.plan import refuse
    from portllm.pipeline.port import run_port
    from portllm.pipeline.route import AUTO, Route
    from portllm.pipeline.update import Update

    if force and method != AUTO:
        raise typer.BadParameter("--force goes with --method auto; a method that is named ports whatever fits.")
    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    route = Route(update, method=method, force=force, allow_other_base=allow_other_base)
    found = find_patches(patches)
    outputs = found.outputs(output)

    def carry(patch: "Patch[TensorInfo]", number: int) -> "tuple[PortPlan, Patch[TensorInfo] | None]":
        plan = route.plan(patch)
        if warning := port_warning(plan):
            say(warning, err=True)
        if found.is_single and not as_json:
            say(render_port_plan(plan, output))
        if not dry_run:
            return plan, run_port(plan, outputs[number], overwrite=overwrite)
        refuse(plan.refusals)
        check_free(outputs[number], overwrite=overwrite)
        return plan, None

    if found.is_single:
        _, ported = carry(load_patch(found.folders[0]), 0)
        if as_json and ported is not None:
            print_json(ported_to_json(ported, output))
        return
    outcomes = open_each(found, carry)
    if as_json:
        print_json(port_outcomes_to_json(outcomes, outputs))
    else:
        say(render_port_outcomes(outcomes, outputs))
    if any(outcome.error for outcome in outcomes):
        raise typer.Exit(1)
