"""Commands that make a patch of what is there: capture, combine."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.data import PromptFileOption, given_prompt
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say

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


def capture(
    base: Annotated[str, typer.Option("--base", help=options.BASE)],
    output: options.Out,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A PEFT LoRA adapter.")] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--initial",
            help="The adapter before training, if it was initialized from the base's weights (PiSSA, OLoRA).",
        ),
    ] = None,
    tuned: Annotated[str | None, typer.Option("--tuned", help="The fine-tuned model, to extract a patch from.")] = None,
    fitted_to: Annotated[
        FittedName | None,
        typer.Option("--fitted-to", help="With --adapter: how --base was quantized during training (QLoRA)."),
    ] = None,
    left_alone: Annotated[
        str | None,
        typer.Option(
            "--left-alone", help="With --fitted-to: comma-separated modules kept in 16 bit. Defaults to the head."
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            help="With --tuned: rank of the extracted deltas; auto keeps what stands above rounding noise. "
            "Defaults to auto.",
        ),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", parser=whole(), help="Upper limit for --rank auto.")
    ] = None,
    dense: Annotated[
        DenseName | None,
        typer.Option(
            "--dense",
            help="With --tuned: keep or drop changes to norms, biases, embeddings and heads. Defaults to keep.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            help="Prompt template of the training data, kept in the patch so that evaluate and certify ask the same "
            "way.",
        ),
    ] = None,
    prompt_file: PromptFileOption = None,
    completion: Annotated[
        str | None, typer.Option("--completion", help="With --prompt: the field with the right answer, kept likewise.")
    ] = None,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a patch from a PEFT adapter, or from a fine-tuned model.

    The base is needed for both: the patch is recorded as one of that model.
    """
    wording = _wording(given_prompt(prompt, prompt_file), completion)
    if (adapter is None) == (tuned is None):
        raise typer.BadParameter("pass exactly one of --adapter and --tuned.")
    if fitted_to is None and left_alone is not None:
        raise typer.BadParameter("--left-alone requires --fitted-to.")
    if tuned is not None:
        if initial is not None or fitted_to is not None:
            raise typer.BadParameter("--initial and --fitted-to require --adapter.")
        chosen = parse_rank(rank or AUTO)
        if isinstance(chosen, int) and max_rank is not None:
            raise typer.BadParameter("--max-rank only applies to --rank auto.")
        _capture_tuned(
            base, tuned, output, None if chosen == AUTO else int(chosen), max_rank, dense or DenseName.KEEP, wording,
            dry_run=dry_run, overwrite=overwrite, as_json=as_json, quiet=quiet,
        )  # fmt: skip
    elif adapter is not None:
        if rank is not None or max_rank is not None or dense is not None:
            raise typer.BadParameter(
                "--rank, --max-rank and --dense require --tuned; an adapter is captured unchanged."
            )
        _capture_adapter(
            base, adapter, initial, output, (fitted_to, left_alone), wording,
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
    try:
        return whole()(text)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"--rank: {error.message.removesuffix('.')}, and not '{AUTO}'.") from None


def _wording(prompt: str | None, completion: str | None) -> dict[str, object]:
    """How prompts were made in training, for the record."""
    if completion is not None and prompt is None:
        raise typer.BadParameter("--completion requires --prompt.")
    from portllm.running.examples import recorded_wording

    return recorded_wording(prompt, completion)


def _capture_adapter(
    base: str,
    adapter: Path,
    initial: Path | None,
    output: Path,
    fitted: tuple[FittedName | None, str | None],
    wording: dict[str, object],
    *,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from portllm.capturing.adapter import plan_capture, run_capture
    from portllm.capturing.decision import decide
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.errors import refuse
    from portllm.files.output_folder import check_free
    from portllm.inspecting.inspect import summarize_patch, summary_to_json
    from portllm.inspecting.text import render_summary
    from portllm.patch.adapter_folder import open_adapter
    from portllm.patch.record import FittedTo
    from portllm.show.headline import headline_lines

    loaded, model = open_adapter(adapter), open_checkpoint(base)
    before = None if initial is None else open_adapter(initial)
    scheme, named = fitted
    left_alone = (model.head_module,) if named is None else tuple(filter(None, named.split(",")))
    fitted_to = None if scheme is None else FittedTo(scheme.value, left_alone)
    plan = plan_capture(loaded, base=model, initial=before, fitted_to=fitted_to)
    refuse(plan.refusals)
    for note in plan.notes:
        say(f"note: {note}", err=True)
    if plan.nothing is not None:
        say(f"warning: {plan.nothing}", err=True)
    if dry_run:
        check_free(output, overwrite=overwrite)
        say(f"would capture {adapter} as a patch of {model.name}: {len(loaded.deltas)} modules match; output: {output}")
        return
    with shown_progress(quiet=quiet) as progress:
        run_capture(plan, output, settings=wording, overwrite=overwrite, progress=progress)
    summary = summarize_patch(output)
    if as_json:
        print_json(summary_to_json(summary))
    else:
        headline = decide(str(output), base, source=str(adapter))
        say("\n".join([*headline_lines(headline), "", render_summary(summary)]), tone=headline.tone)


def _capture_tuned(
    base: str,
    tuned: str,
    output: Path,
    rank: int | None,
    max_rank: int | None,
    dense: DenseName,
    wording: dict[str, object],
    *,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from portllm.capturing.decision import decide
    from portllm.capturing.text import render_tuned_plan, render_tuned_report, tuned_report_to_json
    from portllm.capturing.tuned_plan import plan_capture_tuned
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.errors import refuse
    from portllm.files.output_folder import check_free

    plan = plan_capture_tuned(
        open_checkpoint(base), open_checkpoint(tuned), rank=rank, max_rank=max_rank, dense=dense.value
    )
    if dry_run:
        say(render_tuned_plan(plan, output))
    refuse(plan.refusals)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    from portllm.capturing.tuned import run_capture_tuned

    with shown_progress(quiet=quiet) as progress:
        report = run_capture_tuned(plan, output, settings=wording, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(tuned_report_to_json(report, output))
    else:
        headline = decide(str(output), base, source=tuned, left_out=len(report.left_out))
        say(render_tuned_report(report, output, headline), tone=headline.tone)
