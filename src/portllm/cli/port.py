"""Commands that read headers and samples: inspect, port."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from portllm.checkpoint.tensor.info import TensorInfo
    from portllm.matching.port_plan import PortPlan
    from portllm.patch.patch import Patch


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
    from portllm.errors import refuse
    from portllm.files.output_folder import check_free
    from portllm.matching.update import Update
    from portllm.patch.adapter_folder import load_patch
    from portllm.patch.folders import find_patches, open_each
    from portllm.porting.auto import AUTO, Route
    from portllm.porting.port import run_port
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
