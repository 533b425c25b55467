"""The command `doctor`."""

from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say


def doctor(
    tried: Annotated[
        bool, typer.Option("--try", help="Also load torch, transformers and peft, and compute on each device.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show what is installed and what is missing.

    Versions, extras, devices, caches and the hub login. Asks no server and shows no token. Exits with 3 if something is
    wrong.
    """
    from portllm.diagnosing.doctor import doctor as look
    from portllm.diagnosing.text import doctor_to_json, render_doctor

    report = look(tried=tried)
    if as_json:
        print_json(doctor_to_json(report))
    else:
        say(render_doctor(report), tone="bad" if report.problems else "good")
    if report.problems:
        raise typer.Exit(3)
