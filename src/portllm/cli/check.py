"""The command that says whether patches will hold: check."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.data import PromptFileOption, PromptOption, given_prompt, say_data, say_templates
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say, width_of

if TYPE_CHECKING:
    from portllm.checking.report import CheckReport


def check(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help=options.PATCHES)],
    base: Annotated[str, typer.Option("--base", help=f"The model the patches were made on. {options.MODEL}")],
    evolved: Annotated[str, typer.Option("--evolved", help="The updated base.")],
    trained_on: Annotated[
        str | None,
        typer.Option(
            "--trained-on",
            help="For ported patches: the base they were trained on, to measure the drift since then instead of "
            "adding up the ports.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read every weight of both models instead of a few megabytes of each.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Also run both models on unlabeled prompts from the patches' domain: a data file, or .txt with one "
            "per line.",
        ),
    ] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients", help="With --text: also measure first-order gain and interference (backward passes)."
        ),
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            parser=whole(least=2),
            help="With --text: maximum tokens per prompt; longer prompts are truncated from the left.",
        ),
    ] = 512,
    batch_size: Annotated[int, typer.Option(parser=whole(), help="With --text: prompts per forward pass.")] = 16,
    device: options.Device = options.DeviceName.AUTO,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Show the drift of each layer.")] = False,
    allow_other_base: options.OtherBase = False,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict whether patches will hold on an evolved model.

    Reads a sample of the weights of both models. With --text, both models also run on prompts, which can put a patch in
    doubt. Exits with 3 unless every patch holds. docs/check.md explains each number and where the thresholds come from.
    """
    prompt = given_prompt(prompt, prompt_file)
    if text is None and (prompt is not None or gradients):
        raise typer.BadParameter("--prompt, --prompt-file and --gradients require --text.")
    from portllm.checking.check import check_weights
    from portllm.checking.decision import Checked
    from portllm.checking.text import check_to_json, check_tone, render_check
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.pages import Page, written
    from portllm.cli.progress import shown_progress
    from portllm.patch.folders import find_patches, open_each

    page = Page(html, overwrite=overwrite)
    opened = open_each(find_patches(patches), lambda patch, _: patch)
    there = [outcome.value for outcome in opened if outcome.value is not None]
    failed = [outcome for outcome in opened if outcome.error is not None]
    if failed and not there:
        raise failed[0].error or AssertionError("an outcome without a value has an error")
    before, after = open_checkpoint(base), open_checkpoint(evolved)
    measure: Callable[..., CheckReport] = check_weights
    if text is not None:
        from portllm.probing.check import check as check_on_prompts
        from portllm.probing.domain import read_domain
        from portllm.probing.settings import TextSettings

        prompts = read_domain(text, there, template=prompt)
        if not isinstance(prompts, list):
            say_data(prompts, labels=False, quiet=quiet)
            say_templates(prompts, there, before, after)
        settings = TextSettings(max_tokens=max_tokens, batch_size=batch_size, gradients=gradients)
        measure = partial(check_on_prompts, text=prompts, settings=settings, device=device.value)
    with shown_progress(quiet=quiet) as progress:
        report = measure(
            *there,
            base=before,
            evolved=after,
            trained_on=None if trained_on is None else open_checkpoint(trained_on, progress=progress),
            full=full,
            places=html is not None,
            allow_other_base=allow_other_base,
            progress=progress,
        )
    names = Checked(base, evolved)
    if page.is_wanted:
        from portllm.checking.page import check_page

        wrong = [(str(outcome.folder), str(outcome.error)) for outcome in failed]
        page.write(check_page(report, wrong, checked=names, about=written()))
    if as_json:
        print_json(check_to_json(report, failed))
    else:
        shown = render_check(report, failed, by_layer=by_layer, checked=names, width=width_of(sys.stdout))
        say(shown, tone=check_tone(report, failed))
    if failed or not report.holds:
        raise typer.Exit(1 if failed else 3)
