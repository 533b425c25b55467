"""The command `inspect`."""

from typing import Annotated

import typer

from portllm.cli.options import MODEL, JsonOption, QuietOption
from portllm.cli.terminal import print_json, say


def inspect(
    path: Annotated[str, typer.Argument(help=f"A checkpoint, adapter or patch. {MODEL}")],
    digest: Annotated[
        bool, typer.Option("--digest", help="Compute a checkpoint's digest, which reads all of its bytes.")
    ] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Describe a checkpoint, adapter or patch: identity, family, modules, ranks, scales, size."""
    from portllm.cli.progress import shown_progress
    from portllm.inspecting.inspect import inspect as inspect_path
    from portllm.inspecting.inspect import summary_to_json
    from portllm.inspecting.text import render_summary

    with shown_progress(quiet=quiet) as progress:
        summary = inspect_path(path, with_digest=digest, progress=progress)
    if as_json:
        print_json(summary_to_json(summary))
    else:
        say(render_summary(summary))
