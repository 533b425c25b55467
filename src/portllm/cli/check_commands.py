"""The command that says whether patches will hold: check."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli.main import (
    MODEL,
    PATCHES,
    HtmlOption,
    JsonOption,
    OtherBaseOption,
    OverwriteOption,
    QuietOption,
    app,
)
from portllm.cli.plain import print_json, say


@app.command()
def check(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help=PATCHES)],
    base: Annotated[str, typer.Option("--base", help=f"The model they belong to. {MODEL}")],
    evolved: Annotated[str, typer.Option("--evolved", help="The later version of it.")],
    full: Annotated[
        bool, typer.Option("--full", help="Read every weight of both models, instead of a few megabytes of each.")
    ] = False,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Show the drift of every layer, too.")] = False,
    allow_other_base: OtherBaseOption = False,
    html: HtmlOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say whether patches will hold on an evolved model, from weights alone: the verdict before porting.

    Ends with 3 unless every patch holds. docs/check.md says what each number means and where the thresholds come from.
    """
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.cli.pages import Page
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_check import check_to_json, render_check
    from portllm.patch.folders import find_patches, open_each
    from portllm.pipeline.check import check as check_patches

    page = Page(html, overwrite=overwrite)
    opened = open_each(find_patches(patches), lambda patch, _: patch)
    there = [outcome.value for outcome in opened if outcome.value is not None]
    failed = [outcome for outcome in opened if outcome.error is not None]
    if failed and not there:
        raise failed[0].error or AssertionError("an outcome without a value has an error")
    with shown_progress(quiet=quiet) as progress:
        report = check_patches(
            *there,
            base=open_checkpoint(base),
            evolved=open_checkpoint(evolved),
            full=full,
            places=html is not None,
            allow_other_base=allow_other_base,
            progress=progress,
        )
    if page.is_wanted:
        from portllm.report.check_page import check_page

        page.write(check_page(report, [(str(outcome.folder), str(outcome.error)) for outcome in failed]))
    if as_json:
        print_json(check_to_json(report, failed))
    else:
        say(render_check(report, failed, by_layer=by_layer))
    if failed or not report.holds:
        raise typer.Exit(1 if failed else 3)
