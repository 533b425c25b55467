"""The command that bounds what a port can have lost: certify."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.data import (
    DATA,
    CompletionOption,
    PromptFileOption,
    PromptOption,
    given_prompt,
    say_data,
    say_templates,
)
from portllm.cli.numbers import share, whole
from portllm.cli.terminal import print_json, say


class AnswerName(StrEnum):
    """What counts as an answer."""

    CHOICES = "choices"
    EXACT = "exact"
    FREE = "free"


def certify(
    base: Annotated[str | None, typer.Option("--base", help=options.BASE)] = None,
    patch: Annotated[Path | None, typer.Option("--patch", help="The patch.")] = None,
    evolved: Annotated[str | None, typer.Option("--evolved", help="The updated base.")] = None,
    ported: Annotated[Path | None, typer.Option("--ported", help="The patch ported to the evolved model.")] = None,
    merged: Annotated[
        str | None,
        typer.Option(
            "--merged", help="Instead of --evolved and --ported: the evolved model with the ported patch merged in."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help=f"Inputs, with or without answers. {DATA}")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for certificate.json.")] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    completion: CompletionOption = None,
    answers: Annotated[
        AnswerName,
        typer.Option(
            help="choices picks the likeliest choice; exact compares whole generated answers; free compares token "
            "by token and gives no bound."
        ),
    ] = AnswerName.CHOICES,
    choices: Annotated[
        str | None, typer.Option(help="Comma-separated choices. Defaults to the answers that occur in the data.")
    ] = None,
    one_line: Annotated[
        bool, typer.Option("--one-line", help="Stop a generated answer at the end of its first line.")
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(parser=whole(least=2), help="Maximum tokens per row; longer prompts are truncated from the left."),
    ] = 512,
    max_new_tokens: Annotated[int, typer.Option(parser=whole(), help="Maximum number of tokens to generate.")] = 32,
    batch_size: Annotated[int, typer.Option(parser=whole(), help="Rows per forward pass.")] = 16,
    bound: Annotated[
        float | None, typer.Option(parser=share, help="The accuracy loss to rule out, such as 0.02 or 2%.")
    ] = None,
    max_loss: options.MaxLoss = None,
    confidence: Annotated[float, typer.Option(parser=share, help="Confidence level of the bound.")] = 0.95,
    sample: Annotated[
        int | None, typer.Option(parser=whole(), help="Draw this many rows of the file at random.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for --sample.")] = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only compute how many inputs --bound needs; takes no model and no data.")
    ] = False,
    expected: Annotated[
        float,
        typer.Option(
            "--expected-disagreement",
            parser=share,
            help="With --plan: fraction of inputs expected to be answered differently.",
        ),
    ] = 0.0,
    power: Annotated[
        float,
        typer.Option(parser=share, help="With --plan: probability of meeting the bound at the expected disagreement."),
    ] = 0.9,
    device: options.Device = options.DeviceName.AUTO,
    allow_other_base: options.OtherBase = False,
    dry_run: options.DryRun = False,
    html: options.Html = None,
    card: options.Card = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Bound the accuracy a port can have lost, from unlabeled inputs.

    Exits with 3 if --max-loss (or --bound, the same as a fraction) is not met.
    docs/certify.md says what is claimed and what is not.
    """
    if max_loss is not None:
        if bound is not None:
            raise typer.BadParameter("--max-loss and --bound say the same, in points and as a fraction; give one.")
        if not 0 < max_loss < 100:
            raise typer.BadParameter("--max-loss: give more than 0 and less than 100 points.")
        bound = max_loss / 100
    if plan and html is not None:
        raise typer.BadParameter("--html cannot be used with --plan.")
    if plan:
        _print_plan(bound, confidence, expected, power, as_json=as_json)
        return
    if base is None or patch is None or data is None or output is None:
        raise typer.BadParameter("--base, --patch, --data and --output are required, or --plan and --max-loss alone.")
    if (merged is None) == (evolved is None) or (evolved is None) != (ported is None):
        raise typer.BadParameter("pass --evolved and --ported, or --merged instead of both.")
    from portllm.certifying.certify import plan_certify, run_certify
    from portllm.certifying.decision import decide
    from portllm.certifying.inputs import CertifySettings, read_inputs
    from portllm.certifying.text import render_certificate, render_certify_plan
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.cards import Cards
    from portllm.cli.pages import Page, written
    from portllm.cli.progress import shown_progress
    from portllm.evaluating.decision import Compared
    from portllm.files.output_folder import check_free
    from portllm.files.record import encode
    from portllm.patch.adapter_folder import load_patch

    settings = CertifySettings(
        kind=answers.value,
        choices=tuple(choice.strip() for choice in choices.split(",")) if choices else (),
        prompt=given_prompt(prompt, prompt_file),
        completion=completion,
        one_line=one_line,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        confidence=confidence,
        wanted=bound,
        sample=sample,
        seed=seed,
    )
    check_free(output, overwrite=overwrite)
    page = Page(html, overwrite=overwrite)
    cards = Cards([ported, merged], wanted=card)
    old = load_patch(patch)
    rows = read_inputs(data, old, settings)
    say_data(rows, labels=settings.kind == "choices", quiet=quiet)
    before, after = (open_checkpoint(model) for model in (base, evolved or merged or base))
    say_templates(rows, [old], before, after)
    with shown_progress(quiet=quiet) as progress:
        planned = plan_certify(
            old,
            base=before,
            data=rows,
            evolved=None if evolved is None else after,
            ported=None if ported is None else load_patch(ported),
            merged=None if merged is None else after,
            settings=settings,
            allow_other_base=allow_other_base,
            progress=progress,
        )
        if dry_run:
            say(render_certify_plan(planned, output))
            return
        found = run_certify(planned, output, device=device.value, overwrite=overwrite, progress=progress)
    certificate = found.certificate
    headline = decide(certificate, compared=Compared(str(evolved), str(ported), merged))
    if page.is_wanted:
        from portllm.certifying.page import certify_page

        about = {"data": data.name}
        page.write(
            certify_page(certificate, found.disagreements, headline, chosen=found.chosen, about=about | written())
        )
    cards.add(f"portllm certify: {data.name}", headline.text)
    if as_json:
        print_json(encode(certificate))
    else:
        say(render_certificate(certificate, output, headline), tone=headline.tone)
    if certificate.met is False:
        raise typer.Exit(3)


def _print_plan(bound: float | None, confidence: float, expected: float, power: float, *, as_json: bool) -> None:
    from dataclasses import asdict

    from portllm.certifying.bounds import plan_inputs
    from portllm.certifying.text import render_input_plan

    if bound is None:
        raise typer.BadParameter("--plan requires --max-loss, such as 2, or --bound, such as 0.02.")
    try:
        plan = plan_inputs(bound, confidence=confidence, expected=expected, power=power)
    except ValueError as error:
        raise typer.BadParameter(f"--plan: {error}.") from error
    if as_json:
        print_json(asdict(plan))
    else:
        say(render_input_plan(plan))
