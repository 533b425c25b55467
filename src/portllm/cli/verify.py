"""Commands that prove where files come from: verify, sign."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.options import MODEL, JsonOption, QuietOption
from portllm.cli.terminal import print_json, say

if TYPE_CHECKING:
    from portllm.verifying.signature import Trust

PathArgument = Annotated[Path, typer.Argument(help="A patch, a model that merge wrote, or a certificate.")]
SignatureOption = Annotated[
    Path | None, typer.Option("--signature", help="The signature's file, if not model.sig in the folder.")
]
StagingOption = Annotated[bool, typer.Option("--staging", help="Sigstore's instance for tests.")]


def verify(
    path: PathArgument,
    base: Annotated[
        str | None, typer.Option("--base", help=f"The model that it must belong to, or be merged into. {MODEL}")
    ] = None,
    evolved: Annotated[
        str | None,
        typer.Option("--evolved", help="Of a certificate: the model, evolved or merged, that it must be about."),
    ] = None,
    patch: Annotated[Path | None, typer.Option("--patch", help="Likewise: the old specialist's patch.")] = None,
    ported: Annotated[Path | None, typer.Option("--ported", help="Likewise: the ported patch.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Likewise: the file of inputs.")] = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", help="Who must have signed it: a PEM file.")
    ] = None,
    roots: Annotated[
        list[Path] | None,
        typer.Option("--certificate-chain", help="Who must vouch for the signer: a PEM file; may be given again."),
    ] = None,
    identity: Annotated[str | None, typer.Option("--identity", help="Who must have signed it by Sigstore.")] = None,
    provider: Annotated[
        str | None, typer.Option("--identity-provider", help="Address of who knows the --identity.")
    ] = None,
    staging: StagingOption = False,
    signature: SignatureOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Whether every byte is as it was written, and by whom: digests, schema, base identity, signature."""
    trust = _trust(public_key, roots, identity, provider, staging=staging)
    if signature is not None and trust is None:
        raise typer.BadParameter("--signature: say whose it must be, for example with --public-key.")
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.verifying.certificate import Certified
    from portllm.verifying.checks import verification_to_json
    from portllm.verifying.text import render_verification
    from portllm.verifying.verify import verify as verify_folder

    with shown_progress(quiet=quiet) as progress:
        verification = verify_folder(
            path,
            base=None if base is None else open_checkpoint(base),
            trust=trust,
            signature=signature,
            certified=Certified(None if evolved is None else open_checkpoint(evolved), patch, ported, data)
            if any((evolved, patch, ported, data))
            else None,
            progress=progress,
        )
    if as_json:
        print_json(verification_to_json(verification))
    else:
        say(render_verification(verification))
    if not verification.verified:
        raise typer.Exit(3)


def _trust(
    public_key: Path | None, roots: list[Path] | None, identity: str | None, provider: str | None, *, staging: bool
) -> "Trust | None":
    from portllm.verifying.signature import Identity, PublicKey, Roots

    if sum(means is not None for means in (public_key, roots or None, identity)) > 1:
        raise typer.BadParameter("give one of --public-key, --certificate-chain and --identity.")
    if (identity is None) != (provider is None) or (staging and identity is None):
        raise typer.BadParameter("--identity and --identity-provider go together; --staging goes with them.")
    if public_key is not None:
        return PublicKey(public_key)
    if roots:
        return Roots(tuple(roots))
    if identity is not None and provider is not None:
        return Identity(identity, provider, staging)
    return None
