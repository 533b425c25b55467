"""The commands of a study: run, status and report."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say

study = typer.Typer(
    name="study",
    help="Run the paper's experiment on any model, from a file.\n\nTrain, evolve, port, retrain, score.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

FileArgument = Annotated[Path, typer.Argument(help="TOML file that describes base, patches, tasks and evolutions.")]
OutOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the results. Defaults to FILE with the suffix .study.")
]


def _require_toml(file: Path) -> None:
    """Say that a file is not there, or no TOML, before torch and transformers are loaded to read what is in it."""
    from portllm.errors import StudyFileError
    from portllm.files.toml_file import read_toml

    read_toml(file, kind="study", error=StudyFileError)


@study.command()
def run(
    file: FileArgument,
    out: OutOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the study's data files.")] = None,
    device: options.Device = options.DeviceName.AUTO,
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Run on Ray, one worker per device: auto, local, host:port or ray://host:port."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            parser=whole(),
            help="With --ray: number of workers. Defaults to one per GPU, or one per machine.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the file and list the remaining steps; reads no weights.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the remaining steps of a study and print its tables.

    The same command resumes an interrupted run. A step is run again if anything its result depends on has changed.
    """
    if workers is not None and ray is None:
        raise typer.BadParameter("--workers requires --ray.")
    _require_toml(file)
    from portllm.cli.progress import shown_progress
    from portllm.study.results.markdown import render_page
    from portllm.study.run import run_study, study_status
    from portllm.study.text import render_status, render_step, status_to_json

    if dry_run:
        status = study_status(file, out=out)
        if as_json:
            print_json(status_to_json(status))
        else:
            say(render_status(status, steps=True))
        return
    with shown_progress(quiet=quiet) as progress:
        results = run_study(
            file,
            out=out,
            data=data,
            device=device.value,
            ray=ray,
            workers=workers,
            on_step=lambda step: None if quiet else say(render_step(step), err=True),
            progress=progress,
        )
    if as_json:
        print_json(results.to_json())
    else:
        say(render_page(results).rstrip("\n"))


@study.command()
def status(file: FileArgument, out: OutOption = None, as_json: options.Json = False) -> None:
    """Show how far a study is and how long the rest will take."""
    _require_toml(file)
    from portllm.study.run import study_status
    from portllm.study.text import render_status, status_to_json

    found = study_status(file, out=out)
    if as_json:
        print_json(status_to_json(found))
    else:
        say(render_status(found, steps=False))


@study.command()
def report(
    file: FileArgument,
    out: OutOption = None,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Print the tables of the finished steps of a study as Markdown."""
    _require_toml(file)
    from portllm.cli.pages import Page
    from portllm.study.results.markdown import render_page
    from portllm.study.run import study_results

    page = Page(html, overwrite=overwrite)
    results = study_results(file, out=out)
    if page.is_wanted:
        from portllm.study.results.page import study_page

        page.write(study_page(results))
    if as_json:
        print_json(results.to_json())
    else:
        say(render_page(results).rstrip("\n"))
