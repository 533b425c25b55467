"""Commands that prove where files come from: verify, sign."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say

if TYPE_CHECKING:
    from portllm.verifying.signature import Trust

PathArgument = Annotated[Path, typer.Argument(help="A patch, a merged model, an export, or a certificate.")]
SignatureOption = Annotated[
    Path | None, typer.Option("--signature", help="Signature file. Defaults to model.sig in the folder.")
]
StagingOption = Annotated[bool, typer.Option("--staging", help="Use Sigstore's staging instance.")]


def verify(
    path: PathArgument,
    base: Annotated[
        str | None, typer.Option("--base", help=f"The model it must belong to or be merged into. {options.MODEL}")
    ] = None,
    evolved: Annotated[
        str | None,
        typer.Option("--evolved", help="For a certificate: the evolved or merged model it must be about."),
    ] = None,
    patch: Annotated[
        Path | None,
        typer.Option(
            "--patch",
            help="For a merged model, whichever tool wrote it: the patch it must hold, with --base. For a certificate: "
            "the original patch.",
        ),
    ] = None,
    ported: Annotated[Path | None, typer.Option("--ported", help="For a certificate: the ported patch.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="For a certificate: the file of inputs.")] = None,
    public_key: Annotated[Path | None, typer.Option("--public-key", help="The signer's public key (PEM).")] = None,
    roots: Annotated[
        list[Path] | None,
        typer.Option("--certificate-chain", help="A trusted certificate (PEM). Can be repeated."),
    ] = None,
    identity: Annotated[
        str | None, typer.Option("--identity", help="The identity that must have signed it with Sigstore.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option("--identity-provider", help="URL of the OpenID Connect provider of --identity.")
    ] = None,
    staging: StagingOption = False,
    signature: SignatureOption = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify digests and signature, or that a merge holds a patch.

    With --patch and --base, every tensor of the model is compared with what merging the patch gives: exactly, to
    rounding, in part or not at all, and which tensors are wrong.
    """
    trust = _trust(public_key, roots, identity, provider, staging=staging)
    if signature is not None and trust is None:
        raise typer.BadParameter("--signature: also name the expected signer, for example with --public-key.")
    from portllm.certifying.certificate import CERTIFICATE_FILE
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.verifying.certificate import Certified
    from portllm.verifying.checks import verification_to_json
    from portllm.verifying.text import render_verification
    from portllm.verifying.verify import verify as verify_folder

    is_certificate = (path / CERTIFICATE_FILE).is_file()
    if patch is not None and base is None and not is_certificate:
        raise typer.BadParameter("--patch: also pass the model that it was merged into, with --base.")
    with shown_progress(quiet=quiet) as progress:
        verification = verify_folder(
            path,
            base=None if base is None else open_checkpoint(base),
            trust=trust,
            signature=signature,
            certified=Certified(None if evolved is None else open_checkpoint(evolved), patch, ported, data)
            if is_certificate or any((evolved, ported, data))
            else None,
            patch=None if is_certificate or patch is None else patch,
            progress=progress,
        )
    if as_json:
        print_json(verification_to_json(verification))
    else:
        say(render_verification(verification), tone="good" if verification.verified else "bad")
    if not verification.verified:
        raise typer.Exit(3)


def _trust(
    public_key: Path | None, roots: list[Path] | None, identity: str | None, provider: str | None, *, staging: bool
) -> "Trust | None":
    from portllm.verifying.signature import Identity, PublicKey, Roots

    if sum(means is not None for means in (public_key, roots or None, identity)) > 1:
        raise typer.BadParameter("pass only one of --public-key, --certificate-chain and --identity.")
    if (identity is None) != (provider is None) or (staging and identity is None):
        raise typer.BadParameter("--identity and --identity-provider must be used together; --staging requires both.")
    if public_key is not None:
        return PublicKey(public_key)
    if roots:
        return Roots(tuple(roots))
    if identity is not None and provider is not None:
        return Identity(identity, provider, staging)
    return None
