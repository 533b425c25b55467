"""Commands that work on files alone: inspect, port, merge."""

from dataclasses import replace
from enum import StrEnum
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
    app,
)
from portllm.cli.plain import print_json, say

if TYPE_CHECKING:
    from portllm.checkpoint.header import TensorInfo
    from portllm.patch.patch import Patch
    from portllm.pipeline.plan import PortPlan


class DType(StrEnum):
    """Storage dtypes that weights can be merged to."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"


class RoundingName(StrEnum):
    """How a sum is brought to the storage dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class MergeDevice(StrEnum):
    """Where the sums of a merge are computed."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command()
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


@app.command()
def port(
    patches: Annotated[
        list[Path], typer.Argument(metavar="PATCH...", help=f"{PATCHES} One without a record needs --base.")
    ],
    evolved: Annotated[str, typer.Option("--evolved", help=f"The model to carry it to. {MODEL}")],
    output: OutOption,
    base: Annotated[str | None, typer.Option("--base", help="The model the patch belongs to.")] = None,
    method: Annotated[str, typer.Option("--method", help="How to carry it; 'add' takes the delta as it is.")] = "add",
    allow_other_base: OtherBaseOption = False,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Carry patches over to an evolved model; they stay adapters. Reads headers and samples.

    Weights are read only of tensors that a patch holds whole; these need --base. Several patches go each to a subfolder
    of the output, named like its own folder; one that fails does not stop the others.
    """
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free
    from portllm.cli.render import render_port_plan
    from portllm.cli.render_several import port_outcomes_to_json, ported_to_json, render_port_outcomes
    from portllm.patch.adapter_folder import load_patch
    from portllm.patch.folders import find_patches, open_each
    from portllm.pipeline.plan import plan_port_on, require
    from portllm.pipeline.port import run_port
    from portllm.pipeline.update import Update

    update = Update(None if base is None else open_checkpoint(base), open_checkpoint(evolved))
    found = find_patches(patches)
    outputs = found.outputs(output)

    def carry(patch: "Patch[TensorInfo]", number: int) -> "tuple[PortPlan, Patch[TensorInfo] | None]":
        plan = plan_port_on(patch, update, method=method, allow_other_base=allow_other_base)
        if found.is_single and not as_json:
            say(render_port_plan(plan, output))
        if not dry_run:
            return plan, run_port(plan, outputs[number], overwrite=overwrite)
        require(plan)
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


@app.command()
def merge(
    patch: Annotated[Path, typer.Argument(help="The patch.")],
    into: Annotated[str, typer.Option("--into", help=f"The model it belongs to. {MODEL}")],
    output: OutOption,
    dtype: Annotated[DType | None, typer.Option("--dtype", help="Store all weights so; else as they are.")] = None,
    rounding: Annotated[
        RoundingName, typer.Option("--rounding", help="stochastic is for BF16.")
    ] = RoundingName.NEAREST,
    seed: Annotated[int, typer.Option("--seed", help="Of stochastic rounding.")] = 0,
    device: Annotated[
        MergeDevice, typer.Option("--device", help="Computes the sums; a GPU may round its last bit otherwise.")
    ] = MergeDevice.CPU,
    max_shard_size: Annotated[float, typer.Option("--max-shard-size", help="In GB.", min=0.001)] = 5.0,
    quantized_base: Annotated[
        str | None,
        typer.Option("--quantized-base", help="What the patch belongs to, if that was quantized from --into."),
    ] = None,
    allow_other_base: OtherBaseOption = False,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add a patch to a model's weights, streamed; says what rounding takes of it."""
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free, space_refusals
    from portllm.cli.progress import shown_progress
    from portllm.cli.render import render_merge_plan, render_merge_report
    from portllm.output.manifest import report_to_json
    from portllm.patch.adapter_folder import load_patch
    from portllm.pipeline.plan import plan_merge, require

    plan = plan_merge(
        load_patch(patch),
        into=open_checkpoint(into),
        dtype=None if dtype is None else dtype.value,
        shard_bytes=int(max_shard_size * 10**9),
        quantized_base=None if quantized_base is None else open_checkpoint(quantized_base),
        allow_other_base=allow_other_base,
    )
    plan = replace(plan, refusals=(*plan.refusals, *space_refusals(output, plan.n_bytes)))
    if dry_run:
        say(render_merge_plan(plan, output))
    require(plan)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    from portllm.pipeline.blocks import Nearest, Stochastic
    from portllm.pipeline.merge import run_merge

    chosen = Stochastic(seed) if rounding is RoundingName.STOCHASTIC else Nearest()
    with shown_progress(quiet=quiet) as progress:
        report = run_merge(plan, output, rounding=chosen, device=device.value, overwrite=overwrite, progress=progress)
    if as_json:
        from portllm import __version__

        print_json(report_to_json(report, program=__version__))
    else:
        say(render_merge_report(report, output, plan.notes))
