"""The command `inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say


def inspect(
    path: Annotated[str, typer.Argument(help=f"A checkpoint, adapter or patch. {options.MODEL}")],
    digest: Annotated[
        bool, typer.Option("--digest", help="Compute a checkpoint's digest, which reads all of its bytes.")
    ] = False,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="DIR", help="Of a builtin: model, also write it to this folder.")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Describe a checkpoint, adapter or patch.

    Identity, family, modules, ranks, scales and size.
    """
    from portllm.checkpoint.open import BUILTIN_PREFIX
    from portllm.cli.progress import shown_progress
    from portllm.inspecting.inspect import inspect as inspect_path
    from portllm.inspecting.inspect import summary_to_json
    from portllm.inspecting.text import render_summary

    if export is not None and not path.startswith(BUILTIN_PREFIX):
        raise typer.BadParameter(
            "--export writes out a builtin: model. Fetch one of the Hub with: hf download NAME --local-dir DIR."
        )
    with shown_progress(quiet=quiet) as progress:
        summary = inspect_path(path, with_digest=digest, progress=progress)
        if export is not None:
            from portllm.checkpoint.builtin import export_builtin

            export_builtin(path.removeprefix(BUILTIN_PREFIX), export, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({**summary_to_json(summary), **({"exported": str(export)} if export else {})})
    else:
        say(render_summary(summary))
        if export is not None:
            say(f"written to {export}")
