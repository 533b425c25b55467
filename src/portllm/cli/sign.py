"""The command `sign`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say
from portllm.cli.verify import PathArgument, SignatureOption, StagingOption

if TYPE_CHECKING:
    from portllm.verifying.signature import Signer


def sign(
    path: PathArgument,
    key: Annotated[
        Path | None, typer.Option("--key", help="Your private key (PEM; elliptic curve P-256 to P-521).")
    ] = None,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="File whose first line is the password of --key.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="The certificate of --key (PEM).")] = None,
    chain: Annotated[
        list[Path] | None,
        typer.Option("--certificate-chain", help="An intermediate certificate (PEM). Can be repeated."),
    ] = None,
    sigstore: Annotated[
        bool, typer.Option("--sigstore", help="Sign with your identity instead of a key (Sigstore; needs the network).")
    ] = False,
    identity_token: Annotated[
        str | None,
        typer.Option("--identity-token", help="OpenID Connect token for --sigstore. Without it, a browser opens."),
    ] = None,
    staging: StagingOption = False,
    signature: SignatureOption = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Sign a patch, merged model or certificate: every file of it."""
    signer = _signer(key, password_file, certificate, chain or [], identity_token, sigstore=sigstore, staging=staging)
    from portllm.show.headline import Headline, command_line, headline_lines
    from portllm.verifying.sign import sign as sign_path

    file = sign_path(path, signer, signature=signature, overwrite=overwrite)
    if as_json:
        print_json({"path": str(path), "signature": str(file)})
    else:
        trust = ["--certificate-chain", "ROOT.pem"] if certificate else ["--public-key", "PUBLIC.pem"]
        if sigstore:
            trust = ["--identity", "IDENTITY", "--identity-provider", "URL"]
        command = command_line("portllm", "verify", path, *trust)
        signed = f"Signed {path}: every file of it, in {file}."
        headline = Headline("good", signed, (), "whoever has it can verify it", command)
        say("\n".join(headline_lines(headline)), tone=headline.tone)


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
    from portllm.files.input_file import read_input
    from portllm.verifying.signature import MAX_KEY_BYTES, CertificateSigner, KeySigner, SigstoreSigner

    if (key is None) == (not sigstore):
        raise typer.BadParameter("pass either --key or --sigstore.")
    if key is None:
        if password_file is not None or certificate is not None or chain:
            raise typer.BadParameter("--password-file, --certificate and --certificate-chain require --key.")
        return SigstoreSigner(identity_token, staging)
    if identity_token is not None or staging:
        raise typer.BadParameter("--identity-token and --staging require --sigstore.")
    if certificate is not None:
        if password_file is not None:
            raise typer.BadParameter("--password-file: a key used with --certificate must not be encrypted.")
        return CertificateSigner(key, certificate, tuple(chain))
    if chain:
        raise typer.BadParameter("--certificate-chain requires --certificate.")
    if password_file is None:
        return KeySigner(key)
    try:
        return KeySigner(key, read_input(password_file, most=MAX_KEY_BYTES).decode("utf-8").split("\n", 1)[0])
    except (OSError, UnicodeDecodeError) as error:
        raise SignatureError(f"'{password_file}': cannot be read: {error}.") from error
