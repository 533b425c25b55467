"""The command that proves a served patch: prove."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.data import DATA, PromptFileOption, PromptOption, given_prompt, say_data
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say


def prove(
    patch: Annotated[Path, typer.Argument(help="The patch.")],
    base: Annotated[str, typer.Option("--base", help=f"The model it belongs to. {options.MODEL}")],
    runtime: Annotated[
        str,
        typer.Option(
            "--runtime",
            metavar="NAME|URL",
            help="The runtime to start (docs/prove.md lists them), or the address of a server that runs already, such "
            "as http://localhost:8000/v1.",
        ),
    ] = "mistralrs",
    export: Annotated[
        Path | None,
        typer.Option("--export", help="What the runtime loads as the patch. By default it is exported for it first."),
    ] = None,
    served_base: Annotated[
        Path | None,
        typer.Option("--served-base", help="What the runtime loads as the base, such as a .gguf file for llamacpp."),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", help="With a URL: what the server calls the base.")
    ] = None,
    patch_name: Annotated[
        str | None, typer.Option("--patch-name", help="With a URL: what the server calls the patch.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option("--python", help="The Python of the environment that has the runtime.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help=f"Prompts to ask; without them, built-in ones. {DATA}")
    ] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    limit: Annotated[int, typer.Option(parser=whole(), help="Maximum number of rows of --data to ask.")] = 32,
    device: options.Device = options.DeviceName.AUTO,
    allow_other_base: options.OtherBase = False,
    html: options.Html = None,
    card: options.Card = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prove that a runtime serves a patch as it is.

    Base and patch are loaded in it, or asked of a server, and their log-probabilities compared with those here.

    Exits with 3 if it is not proven. docs/prove.md says what is compared.
    """
    is_url = runtime.startswith(("http://", "https://"))
    if is_url and (base_name is None or patch_name is None):
        raise typer.BadParameter("with a URL, --base-name and --patch-name are required: what the server calls both.")
    if is_url and (export or served_base or python):
        raise typer.BadParameter("--export, --served-base and --python are for a runtime that is started, not a URL.")
    if not is_url and (base_name or patch_name):
        raise typer.BadParameter("--base-name and --patch-name are for a URL.")
    from portllm.cli.cards import Cards
    from portllm.cli.pages import Page
    from portllm.cli.progress import shown_progress
    from portllm.files.record import encode
    from portllm.patch.adapter_folder import load_patch
    from portllm.proving.decision import decide
    from portllm.proving.prompts import PROMPTS
    from portllm.proving.prove import Endpoint
    from portllm.proving.prove import prove as prove_patch
    from portllm.proving.text import render_proof
    from portllm.running.data import read_data

    page = Page(html, overwrite=overwrite)
    cards = Cards([patch], wanted=card)
    opened = load_patch(patch)
    template = given_prompt(prompt, prompt_file)
    rows = None if data is None else read_data(data, opened, prompt=template, answers=False)
    if rows is None and template is not None:
        raise typer.BadParameter("--prompt and --prompt-file make prompts of the rows of --data.")
    if rows is not None:
        say_data(rows, labels=False, quiet=quiet)
    with shown_progress(quiet=quiet) as progress:
        proof = prove_patch(
            opened,
            base=base,
            runtime=Endpoint(runtime, base_name, patch_name) if base_name and patch_name else runtime,
            export=export,
            served_base=served_base,
            python=python,
            prompts=rows or PROMPTS,
            limit=limit,
            allow_other_base=allow_other_base,
            device=device.value,
            progress=progress,
        )
    headline = decide(proof)
    if page.is_wanted:
        from portllm.proving.page import prove_page

        page.write(prove_page(proof, headline))
    where = "a server" if is_url else f"{proof.runtime} {proof.version}"
    cards.add(
        f"portllm prove: {where}", headline.text.replace(proof.runtime, "the server") if is_url else headline.text
    )
    if as_json:
        print_json(encode(proof) | {"decision": {"text": headline.text, "proven": proof.proven}})
    else:
        say(render_proof(proof, headline), tone=headline.tone)
    if not proof.proven:
        raise typer.Exit(3)
