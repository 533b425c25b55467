"""The command export."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say


def export(
    patch: Annotated[Path, typer.Argument(help="A patch or a PEFT LoRA adapter.")],
    runtime: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="peft, vllm, sglang, tgi, mistralrs, llamacpp, ollama, mlx or openvino.",
        ),
    ],
    output: options.Out,
    base: Annotated[
        str | None, typer.Option("--base", help=f"The model that is served; some forms depend on it. {options.MODEL}")
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf",
            help="For ollama, with a model in safetensors: a GGUF file of it or of an older version, also a quantized "
            "one, whose metadata and tokenizer are used.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Dtype of the factors. Defaults to float32, which is exact. With --gguf: of the matrices.",
        ),
    ] = None,
    allow_other_base: options.OtherBase = False,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a patch in the form that a runtime takes.

    What the runtime has no place for is refused by name before anything is written, with the way out. The name to serve
    it under is printed: another patch, base or port has another one, so that no cache of the old one is used.
    """
    from portllm.checkpoint.gguf.file import open_gguf
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.errors import refuse
    from portllm.exporting.decision import decide
    from portllm.exporting.export import run_export
    from portllm.exporting.plan import plan_export
    from portllm.exporting.text import exported_to_json, render_export_plan, render_exported
    from portllm.files.output_folder import check_free
    from portllm.patch.adapter_folder import load_patch
    from portllm.serving.runtime import runtime_named

    plan = plan_export(
        load_patch(patch),
        runtime_named(runtime),
        base=None if base is None else open_checkpoint(base),
        gguf=None if gguf is None else open_gguf(gguf),
        dtype=dtype,
        allow_other_base=allow_other_base,
    )
    if dry_run:
        say(render_export_plan(plan, output))
    refuse(plan.refusals)
    if plan.nothing is not None:
        say(f"warning: {plan.nothing}", err=True)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    with shown_progress(quiet=quiet) as progress:
        exported = run_export(plan, output, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(exported_to_json(exported))
    else:
        headline = decide(exported, str(patch))
        say(render_exported(exported, headline), tone=headline.tone)
