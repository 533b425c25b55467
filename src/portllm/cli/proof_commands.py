"""Commands that prove where files come from: verify, sign."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.main import MODEL, JsonOption, OverwriteOption, QuietOption
from portllm.cli.plain import print_json, say

if TYPE_CHECKING:
    from portllm.pipeline.signature import Signer, Trust

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
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_proof import render_verification
    from portllm.pipeline.certificate_checks import Certified
    from portllm.pipeline.verification import verification_to_json
    from portllm.pipeline.verify import verify as verify_folder

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


def sign(
    path: PathArgument,
    key: Annotated[Path | None, typer.Option("--key", help="Your private key: a PEM file, on P-256 to P-521.")] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="Its first line is the password of the --key.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="Of the --key: a PEM file.")] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option("--certificate-chain", help="What lies between it and a root: PEM; may be given again."),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign by your identity, without a key; needs the network.")
    ] = False,
    identity_token: Annotated[
        str | None, typer.Option("--identity-token", help="Who you are, for --sigstore; else a browser asks.")
    ] = None,
    staging: StagingOption = False,
    signature: SignatureOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sign every file, and with patch.json the identity of the base and the chain of ports."""
    signer = _signer(key, password_file, certificate, chain or [], identity_token, sigstore=sigstore, staging=staging)
    from portllm.pipeline.sign import sign as sign_path

    file = sign_path(path, signer, signature=signature, overwrite=overwrite)
    if as_json:
        print_json({"path": str(path), "signature": str(file)})
    else:
        say(f"signed {path}: {file}")


def _trust(
    public_key: Path | None, roots: list[Path] | None, identity: str | None, provider: str | None, *, staging: bool
) -> "Trust | None":
    from portllm.pipeline.signature import Identity, PublicKey, Roots

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


def _signer(
    key: Path | None,
    password_file: Path | None,
    certificate: Path | None,
    chain: list[Path],
    identity_token: str | None,
    *,
    sigstore: bool,
    staging: bool,
) -> "Signer":
    from portllm.errors import SignatureError
    from portllm.pipeline.signature import CertificateSigner, KeySigner, SigstoreSigner

    if (key is None) == (not sigstore):
        raise typer.BadParameter("give one of --key and --sigstore.")
    if key is None:
        if password_file is not None or certificate is not None or chain:
            raise typer.BadParameter("--password-file, --certificate and --certificate-chain go with --key.")
        return SigstoreSigner(identity_token, staging)
    if identity_token is not None or staging:
        raise typer.BadParameter("--identity-token and --staging go with --sigstore.")
    if certificate is not None:
        if password_file is not None:
            raise typer.BadParameter("--password-file: a key that goes with a --certificate must not be encrypted.")
        return CertificateSigner(key, certificate, tuple(chain))
    if chain:
        raise typer.BadParameter("--certificate-chain goes with --certificate.")
    if password_file is None:
        return KeySigner(key)
    try:
        return KeySigner(key, password_file.read_text(encoding="utf-8").split("\n", 1)[0])
    except (OSError, UnicodeDecodeError) as error:
        raise SignatureError(f"'{password_file}': cannot be read: {error}.") from error
