"""The command that does many patches and updates at once: fleet."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say, width_of


def fleet(
    file: Annotated[
        Path, typer.Argument(help="TOML file that lists patches, evolved models, what to do and where to write.")
    ],
    workers: Annotated[
        int | None,
        typer.Option("--workers", parser=whole(), help="Number of workers. Defaults to what cores and memory allow."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Run on Ray: auto, local, host:port or ray://host:port.")
    ] = None,
    retries: Annotated[
        int,
        typer.Option(
            "--retries", parser=whole(least=0), help="Retries of a cell whose worker died or whose network failed."
        ),
    ] = 2,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Port many patches to many evolved models.

    Runs on this machine or on a Ray cluster. A failing cell does not stop the others. A second run of the same file
    does only what is missing. Exits with 3 unless every checked patch holds.
    """
    from portllm.cli.progress import shown_progress
    from portllm.fleets.decision import decide
    from portllm.fleets.fleet import forecast_fleet, open_pool, plan_fleet, run_fleet
    from portllm.fleets.text import fleet_to_json, render_fleet

    plan = plan_fleet(file, overwrite=overwrite)
    with shown_progress(quiet=quiet) as progress, open_pool(plan, workers=workers, ray=ray) as pool:
        carry_out = forecast_fleet if dry_run else run_fleet
        rows = carry_out(plan, pool, retries=retries, progress=progress)
    if as_json:
        print_json(fleet_to_json(plan, rows, dry=dry_run))
    else:
        headline = decide(rows, dry=dry_run, file=str(file), output=plan.work.output)
        say(render_fleet(plan, rows, headline, dry=dry_run, width=width_of(sys.stdout)), tone=headline.tone)
    if any(row.status in ("refused", "failed") for row in rows):
        raise typer.Exit(1)
    if not all(row.holds for row in rows):
        raise typer.Exit(3)
