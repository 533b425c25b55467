"""Commands that make a patch of what is there: capture, combine."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.main import (
    MODEL,
    DryRunOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    QuietOption,
)
from portllm.cli.plain import print_json, say

if TYPE_CHECKING:
    from portllm.patch.record import FittedTo
    from portllm.pipeline.combine import Combination

AUTO = "auto"


class DenseName(StrEnum):
    """What becomes of the tensors that are no linear weights."""

    KEEP = "keep"
    DROP = "drop"


class FittedName(StrEnum):
    """How a base was quantized when it was loaded."""

    NF4 = "nf4"
    NF4_DOUBLE = "nf4-double"
    FP4 = "fp4"
    FP4_DOUBLE = "fp4-double"


class CombineMethod(StrEnum):
    """How patches are combined."""

    CONCATENATE = "concatenate"
    TIES = "ties"
    DARE = "dare"


def capture(
    base: Annotated[str, typer.Option("--base", help=f"The model it was made on. {MODEL}")],
    output: OutOption,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A PEFT LoRA folder.")] = None,
    initial: Annotated[
        Path | None, typer.Option("--initial", help="It before training, if it began with a part of the base (PiSSA).")
    ] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="The base after fine-tuning, whole.")] = None,
    fitted_to: Annotated[
        FittedName | None,
        typer.Option("--fitted-to", help="With --adapter: how --base was quantized while it was trained (QLoRA)."),
    ] = None,
    left_alone: Annotated[
        str | None,
        typer.Option("--left-alone", help="With --fitted-to: modules that stayed in 16 bit, between commas; lm_head."),
    ] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", help="Of deltas from --tuned: a number, or auto: above rounding noise.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option("--max-rank", min=1, help="Bounds --rank auto.")] = None,
    dense: Annotated[
        DenseName | None, typer.Option("--dense", help="Norms, biases, embeddings, heads of --tuned; else kept.")
    ] = None,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a patch that knows its base: from an adapter, or from a base and what fine-tuning made of it."""
    if (adapter is None) == (tuned is None):
        raise typer.BadParameter("give exactly one of --adapter and --tuned.")
    if fitted_to is None and left_alone is not None:
        raise typer.BadParameter("--left-alone goes with --fitted-to.")
    if tuned is not None:
        if initial is not None or fitted_to is not None:
            raise typer.BadParameter("--initial and --fitted-to go with --adapter.")
        chosen = parse_rank(rank or AUTO)
        if isinstance(chosen, int) and max_rank is not None:
            raise typer.BadParameter("--max-rank bounds --rank auto; with a number it says nothing.")
        _capture_tuned(
            base, tuned, output, None if chosen == AUTO else int(chosen), max_rank, dense or DenseName.KEEP,
            dry_run=dry_run, overwrite=overwrite, as_json=as_json, quiet=quiet,
        )  # fmt: skip
    elif adapter is not None:
        if rank is not None or max_rank is not None or dense is not None:
            raise typer.BadParameter("--rank, --max-rank and --dense go with --tuned; an adapter is taken as it is.")
        _capture_adapter(
            base, adapter, initial, output, _fitted_to(fitted_to, left_alone),
            dry_run=dry_run, overwrite=overwrite, as_json=as_json, quiet=quiet,
        )  # fmt: skip


def parse_rank(text: str) -> int | str:
    """A number from 1 on, or `auto`.

    Example:
        >>> parse_rank("16"), parse_rank("auto")
        (16, 'auto')
    """
    if text == AUTO:
        return AUTO
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"--rank {text}: must be a number from 1 on, or auto.")
    return int(text)


def _fitted_to(scheme: FittedName | None, left_alone: str | None) -> "FittedTo | None":
    if scheme is None:
        return None
    from portllm.patch.record import FittedTo
    from portllm.pipeline.fitted import LEFT_ALONE

    return FittedTo(scheme.value, LEFT_ALONE if left_alone is None else tuple(filter(None, left_alone.split(","))))


def _capture_adapter(
    base: str,
    adapter: Path,
    initial: Path | None,
    output: Path,
    fitted_to: "FittedTo | None",
    *,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free
    from portllm.cli.progress import shown_progress
    from portllm.cli.render import render_summary
    from portllm.errors import PlanRefusedError
    from portllm.patch.adapter_folder import open_adapter
    from portllm.pipeline.capture import capture_adapter, plan_capture
    from portllm.pipeline.inspect import summarize_patch, summary_to_json

    loaded, model = open_adapter(adapter), open_checkpoint(base)
    before = None if initial is None else open_adapter(initial)
    if dry_run:
        if refusals := plan_capture(loaded, base=model, initial=before, fitted_to=fitted_to):
            raise PlanRefusedError(refusals)
        check_free(output, overwrite=overwrite)
        say(f"would capture {adapter} as a patch of {model.name}: {len(loaded.deltas)} modules fit; to {output}")
        return
    with shown_progress(quiet=quiet) as progress:
        capture_adapter(
            loaded,
            base=model,
            out=output,
            initial=before,
            fitted_to=fitted_to,
            overwrite=overwrite,
            progress=progress,
        )
    summary = summarize_patch(output)
    if as_json:
        print_json(summary_to_json(summary))
    else:
        say(render_summary(summary))


def _capture_tuned(
    base: str,
    tuned: str,
    output: Path,
    rank: int | None,
    max_rank: int | None,
    dense: DenseName,
    *,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_make import render_tuned_plan, render_tuned_report, tuned_report_to_json
    from portllm.errors import PlanRefusedError
    from portllm.pipeline.tuned_plan import plan_capture_tuned

    plan = plan_capture_tuned(
        open_checkpoint(base), open_checkpoint(tuned), rank=rank, max_rank=max_rank, dense=dense.value
    )
    if dry_run:
        say(render_tuned_plan(plan, output))
    if plan.refusals:
        raise PlanRefusedError(plan.refusals)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    from portllm.pipeline.capture_tuned import run_capture_tuned

    with shown_progress(quiet=quiet) as progress:
        report = run_capture_tuned(plan, output, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(tuned_report_to_json(report, output))
    else:
        say(render_tuned_report(report, output))


def combine(
    patches: Annotated[list[Path], typer.Argument(help="Two patches or more, of one base.")],
    output: OutOption,
    weights: Annotated[str | None, typer.Option("--weights", help="Between commas, one a patch; else 1.")] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", help="Cut to a number, or auto: what is more than rounding. Else exact.")
    ] = None,
    method: Annotated[CombineMethod, typer.Option("--method", help="ties and dare choose elements.")] = (
        CombineMethod.CONCATENATE
    ),
    density: Annotated[
        float, typer.Option("--density", min=0.0, max=1.0, help="Share of elements that ties and dare keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of ties and dare.")] = 0,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Several patches of one base into one: their weighted sum, exact, or cut to a rank."""
    from portllm.checkpoint.writer import check_free
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_make import combine_report_to_json, render_combine_plan, render_combine_report
    from portllm.errors import PlanRefusedError
    from portllm.patch.adapter_folder import load_patch
    from portllm.pipeline.combine import plan_combine, run_combine

    given = None if weights is None else parse_weights(weights, len(patches))
    how = _combination(method, rank, density, seed)
    plan = plan_combine([load_patch(patch) for patch in patches], weights=given, how=how)
    if dry_run:
        say(render_combine_plan(plan, output))
    if plan.refusals:
        raise PlanRefusedError(plan.refusals)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    with shown_progress(quiet=quiet) as progress:
        report = run_combine(plan, output, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(combine_report_to_json(report, output))
    else:
        say(render_combine_report(report, output))


def parse_weights(text: str, count: int) -> list[float]:
    """Numbers between commas, as many as there are patches.

    Example:
        >>> parse_weights("1,-0.5", 2)
        [1.0, -0.5]
    """
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--weights {text}: must be numbers between commas.") from None
    if len(weights) != count or not all(abs(weight) < float("inf") for weight in weights):
        raise typer.BadParameter(f"--weights {text}: must be {count} finite numbers, one for each patch.")
    return weights


def _combination(method: CombineMethod, rank: str | None, density: float, seed: int) -> "Combination":
    from portllm.pipeline.combine import Exact, Selected

    number = None if rank is None or parse_rank(rank) == AUTO else int(rank)
    if method is CombineMethod.CONCATENATE:
        return Exact("auto" if rank == AUTO else number)
    if rank == AUTO:
        raise typer.BadParameter(f"--rank auto: what --method {method} makes has full rank; give a number.")
    if density == 0:
        raise typer.BadParameter("--density 0: keeps nothing.")
    return Selected("ties" if method is CombineMethod.TIES else "dare", density, number, seed)
