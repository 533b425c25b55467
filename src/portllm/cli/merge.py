"""The command merge: into another folder, into the model's own files, and back."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.numbers import gigabytes
from portllm.cli.terminal import print_json, say, width_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from portllm.errors import PortLLMError
    from portllm.merging.decision import Named
    from portllm.merging.manifest import MergeReport
    from portllm.merging.options import MergeOptions
    from portllm.merging.plan import MergePlan
    from portllm.merging.rounding_modes import Rounding


class RoundingName(StrEnum):
    """How a sum is brought to the storage dtype."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


class TokenizerName(StrEnum):
    """Whose tokenizer and chat template a merged model gets."""

    BASE = "base"
    PATCH = "patch"


class MergeDevice(StrEnum):
    """Where the sums of a merge are computed."""

    CPU = "cpu"
    CUDA = "cuda"


def _dtype(name: str) -> str:
    from portllm.errors import UnsupportedDtypeError
    from portllm.tensors.info import float_dtype

    try:
        return float_dtype(name)
    except UnsupportedDtypeError as error:
        raise typer.BadParameter(str(error)) from error


def merge(
    patches: Annotated[list[Path] | None, typer.Argument(metavar="PATCH...", help=options.PATCHES)] = None,
    into: Annotated[str | None, typer.Option("--into", help=f"The model to merge into. {options.MODEL}")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Output folder.")] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Overwrite the model's own files; the overwritten bytes are kept beside them for --undo."
        ),
    ] = False,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="Undo an --in-place merge of the model in this folder (use alone).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            parser=_dtype,
            metavar="DTYPE",
            help="Output dtype: F64, F32, F16 or BF16, or torch's names of these. Defaults to each tensor's own.",
        ),
    ] = None,
    rounding: Annotated[
        RoundingName,
        typer.Option("--rounding", help="How sums are rounded to the output dtype; stochastic is for BF16."),
    ] = RoundingName.NEAREST,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for stochastic rounding.")] = 0,
    device: Annotated[
        MergeDevice, typer.Option("--device", help="Device for the sums; a GPU may differ in the last bit.")
    ] = MergeDevice.CPU,
    max_shard_size: Annotated[
        float, typer.Option("--max-shard-size", parser=gigabytes, help="Maximum size of an output shard, such as 5GB.")
    ] = 5.0,
    quantized_base: Annotated[
        str | None,
        typer.Option(
            "--quantized-base", help="The quantized model the patch was trained on, if it was made from --into."
        ),
    ] = None,
    tokenizer: Annotated[
        TokenizerName | None,
        typer.Option(
            "--tokenizer",
            help="Whose tokenizer and chat template the output gets where they differ. Defaults to the patch's.",
        ),
    ] = None,
    allow_other_base: options.OtherBase = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge a patch into a model's weights.

    Streams one tensor at a time, and reports what rounding costs. Several patches each get a merged model of their own,
    in a subfolder of the output; the model is read once for all of them, and one that fails does not stop the others.
    """
    if undo is not None:
        if patches or into is not None or output is not None or in_place or dry_run:
            raise typer.BadParameter("--undo DIR takes no other options.")
        _undo(undo, as_json=as_json, quiet=quiet)
    elif not patches or into is None or in_place == (output is not None):
        raise typer.BadParameter("pass PATCH, --into MODEL, and either -o DIR or --in-place.")
    elif output is not None:
        from portllm.merging.options import MergeOptions

        how = MergeOptions(
            dtype=dtype,
            rounding=_rounding(rounding, seed),
            device=device.value,
            shard_bytes=int(max_shard_size * 10**9),
            allow_other_base=allow_other_base,
            tokenizer=None if tokenizer is None else tokenizer.value,
        )
        _merge_to(
            patches, into, output, how, quantized_base,
            dry_run=dry_run, overwrite=overwrite, as_json=as_json, quiet=quiet,
        )  # fmt: skip
    elif len(patches) > 1:
        raise typer.BadParameter("--in-place takes one patch.")
    elif dtype is not None or overwrite or quantized_base is not None or tokenizer is not None:
        raise typer.BadParameter(
            "--dtype, --overwrite, --quantized-base and --tokenizer require -o and cannot be used with --in-place."
        )
    else:
        _merge_in_place(
            patches[0], Path(into), _rounding(rounding, seed), device.value,
            allow_other_base=allow_other_base, dry_run=dry_run, as_json=as_json, quiet=quiet,
        )  # fmt: skip


def _merge_to(
    patches: list[Path],
    into: str,
    output: Path,
    how: "MergeOptions",
    quantized_base: str | None,
    *,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Each patch into weights of its own."""
    from portllm.checkpoint.open import open_checkpoint
    from portllm.merging.decision import Named
    from portllm.merging.plan import plan_merge
    from portllm.merging.text import merged_to_json, render_merge_outcomes, render_merge_plan
    from portllm.patch.folders import find_patches, open_each, outcomes_to_json

    model = open_checkpoint(into)
    quantized = None if quantized_base is None else open_checkpoint(quantized_base)
    found = find_patches(patches)
    outputs = found.outputs(output)
    planned = open_each(found, lambda patch, _: plan_merge(patch, into=model, options=how, quantized_base=quantized))
    plans = {out: outcome.value for out, outcome in zip(outputs, planned, strict=True) if outcome.value is not None}
    _warn(plans.values())
    if dry_run and found.is_single:
        for plan in plans.values():
            say(render_merge_plan(plan, output))
    done = _carry_out(plans, dry_run=dry_run, overwrite=overwrite, quiet=quiet)
    outcomes = [outcome.followed_by(done.get(out)) for out, outcome in zip(outputs, planned, strict=True)]
    if not found.is_single:
        if as_json:
            print_json(outcomes_to_json(outcomes, outputs, merged_to_json))
        else:
            say(render_merge_outcomes(outcomes, outputs, into=output, width=width_of(sys.stdout)))
        if any(outcome.error for outcome in outcomes):
            raise typer.Exit(1)
        return
    plan, report = outcomes[0].result()
    if report is not None:
        _show(report, plan, Named(str(patches[0]), into, str(output)), as_json=as_json)


def _carry_out(
    plans: "Mapping[Path, MergePlan]", *, dry_run: bool, overwrite: bool, quiet: bool
) -> "Mapping[Path, MergeReport | PortLLMError]":
    """What becomes of plans, or what would become of those that cannot be carried out."""
    if not plans:
        return {}
    from portllm.cli.progress import shown_progress
    from portllm.merging.merge import problems, run_merges

    if dry_run:
        return problems(plans, overwrite=overwrite)
    with shown_progress(quiet=quiet) as progress:
        return run_merges(plans, overwrite=overwrite, progress=progress)


def _merge_in_place(
    patch: Path,
    folder: Path,
    rounding: "Rounding",
    device: str,
    *,
    allow_other_base: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from portllm.cli.progress import shown_progress
    from portllm.errors import refuse
    from portllm.merging.decision import Named
    from portllm.merging.in_place import plan_in_place, run_in_place
    from portllm.merging.text import render_in_place_plan
    from portllm.patch.adapter_folder import load_patch

    plan = plan_in_place(load_patch(patch), folder, rounding=rounding, device=device, allow_other_base=allow_other_base)
    if dry_run:
        say(render_in_place_plan(plan))
    refuse(plan.merge.refusals)
    _warn([plan.merge])
    if dry_run:
        return
    with shown_progress(quiet=quiet) as progress:
        report = run_in_place(plan, progress=progress)
    _show(report, plan.merge, Named(str(patch), str(folder), str(folder)), as_json=as_json)


def _warn(plans: "Iterable[MergePlan]") -> None:
    for plan in plans:
        if plan.nothing is not None and not plan.refusals:
            say(f"warning: {plan.nothing}", err=True)


def _undo(folder: Path, *, as_json: bool, quiet: bool) -> None:
    from portllm.cli.progress import shown_progress
    from portllm.merging.in_place import undo_merge

    with shown_progress(quiet=quiet) as progress:
        n_restored = undo_merge(folder, progress=progress)
    if as_json:
        print_json({"folder": str(folder), "tensors_restored": n_restored})
    else:
        say(f"Undone: {folder} is as it was before the merge; {n_restored} tensors were restored, every byte checked.")


def _show(report: "MergeReport", plan: "MergePlan", named: "Named", *, as_json: bool) -> None:
    if as_json:
        from portllm import __version__
        from portllm.merging.manifest import report_to_json

        print_json(report_to_json(report, program=__version__))
    else:
        from portllm.merging.decision import decide
        from portllm.merging.text import render_merge_report

        headline = decide(report, named, record=plan.patch.record)
        say(render_merge_report(report, Path(named.output), plan.notes, headline), tone=headline.tone)


def _rounding(name: RoundingName, seed: int) -> "Rounding":
    from portllm.merging.rounding_modes import Nearest, Stochastic

    return Stochastic(seed) if name is RoundingName.STOCHASTIC else Nearest()
