"""Signatures with OpenSSF model-signing, which is imported only when a signature is made or checked.

A signature is a Sigstore bundle in one file. What it signs is a statement with the SHA-256 digest of every file of the
folder; `patch.json` is one of them, and with it the identity of the base and the chain of ports.

Source: the format, https://github.com/sigstore/model-transparency/blob/main/docs/model_signing_format.md.
"""

import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from portllm.errors import CheckpointError, MissingExtraError, OutputError, OutputExistsError, SignatureError
from portllm.files.json_file import read_json
from portllm.files.own_files import inode_of, write_text

if TYPE_CHECKING:
    from model_signing.signing import Config as SigningConfig
    from model_signing.verifying import Config as VerifyingConfig

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 16_000_000
"""Its usual name, in the folder that it signs."""


@dataclass(frozen=True, slots=True)
class KeySigner:
    """Sign with a private key on an elliptic curve (P-256, P-384 or P-521) in a PEM file.

    Attributes:
        private_key: The file.
        password: What it is encrypted with, or None.
    """

    private_key: str | Path
    password: str | None = None


@dataclass(frozen=True, slots=True)
class CertificateSigner:
    """Sign with a private key and the certificate of its public key.

    Attributes:
        private_key: The key's PEM file, not encrypted.
        certificate: Whose key it is.
        chain: The certificates between it and a root.
    """

    private_key: str | Path
    certificate: str | Path
    chain: tuple[str | Path, ...] = ()


@dataclass(frozen=True, slots=True)
class SigstoreSigner:
    """Sign with an identity, such as an e-mail address, instead of a key (Sigstore). Needs the network.

    Attributes:
        identity_token: An OpenID Connect token, or None: that of the machine's environment, else a browser is opened.
        staging: Use Sigstore's instance for tests.
    """

    identity_token: str | None = None
    staging: bool = False


Signer = KeySigner | CertificateSigner | SigstoreSigner


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Trust signatures by the private half of this key.

    Attributes:
        file: The public key, PEM.
    """

    file: str | Path

    def __str__(self) -> str:
        return f"the key of {self.file}"


@dataclass(frozen=True, slots=True)
class Roots:
    """Trust signers with a certificate issued under these roots.

    Attributes:
        files: PEM, at least one: the roots that a system comes with vouch for web sites, not for who may sign models.
    """

    files: tuple[str | Path, ...]

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("roots: at least one file is needed")

    def __str__(self) -> str:
        return f"a certificate under {', '.join(map(str, self.files))}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Trust signatures by a Sigstore identity. Needs the network.

    Attributes:
        name: Such as an e-mail address.
        provider: Address of who knows the identity, such as https://github.com/login/oauth.
        staging: Use Sigstore's instance for tests.
    """

    name: str
    provider: str
    staging: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.provider})"


Trust = PublicKey | Roots | Identity


def sign_folder(folder: Path, signer: Signer, *, signature: Path, overwrite: bool = False) -> None:
    """Sign every file of a folder but signatures.

    Args:
        folder: What to sign.
        signer: By what right.
        signature: The file to write.
        overwrite: Replace it where it exists.

    Raises:
        SignatureError: The key or certificate cannot be used, or the folder cannot be signed.
        OutputExistsError: `signature` exists.
        OutputError: It cannot be written.
        MissingExtraError: model-signing is not installed.
    """
    if os.path.lexists(signature) and not overwrite:
        raise OutputExistsError(f"'{signature}': already exists. Choose another path, or pass --overwrite.")
    if os.path.lexists(signature) and not signature.is_symlink() and not _is_signature(signature):
        raise OutputExistsError(f"'{signature}': is not a signature, so it is not replaced. Choose another path.")
    model_signing = _load()
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=_signatures_in(folder, signature))
    with _translated(f"'{folder}': could not be signed", hint=_hint(signer)):
        config = _signing_config(model_signing, signer).set_hashing_config(hashing)
        with tempfile.TemporaryDirectory(prefix="portllm-sign-") as scratch:
            made = Path(scratch) / SIGNATURE_FILE
            config.sign(folder, made)
            try:
                write_text(signature, made.read_text(encoding="utf-8"))
            except OSError as error:
                raise OutputError(f"'{signature}': cannot be written: {error.strerror}.") from error


def signature_problem(folder: Path, trust: Trust, *, signature: Path | None, required: Collection[str]) -> str | None:
    """Why a folder does not bear the signature that it must, or None.

    Args:
        folder: What must be signed.
        trust: By whom.
        signature: The file of the signature, or None for the usual one.
        required: Files that it must cover; a signature that leaves one of them out is none.

    Raises:
        SignatureError: The key or certificate cannot be read, or Sigstore cannot be reached.
        MissingExtraError: model-signing is not installed.
    """
    file = folder / SIGNATURE_FILE if signature is None else signature
    model_signing = _load()
    with _translated(f"{trust}: cannot be checked against", hint=_hint(trust)):
        config = _verifying_config(model_signing, trust)
    if not file.is_file():
        return f"there is no '{file}'"
    if (size := file.stat().st_size) > MAX_SIGNATURE_BYTES:
        return f"'{file}' has {size} bytes, the limit for a signature is {MAX_SIGNATURE_BYTES}"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config.verify(folder, file)
        unsigned = sorted(set(required) - _signed_files(file))
    except Exception as error:  # what a hostile signature makes the parsers and verifiers below raise has no bound
        return f"not by {trust}, or not over these files: {_told(error)}"
    return f"does not cover '{unsigned[0]}'" if unsigned else None


def _is_signature(file: Path) -> bool:
    try:
        return "dsseEnvelope" in read_json(file)
    except CheckpointError:
        return False


def _signed_files(signature: Path) -> set[str]:
    """The files that a signature, which was verified, covers: a statement may leave out what its signer chose to."""
    envelope = json.loads(signature.read_text(encoding="utf-8"))["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    return {resource["name"] for resource in statement["predicate"]["resources"]}


def _signing_config(model_signing: ModuleType, signer: Signer) -> "SigningConfig":
    config: SigningConfig = model_signing.signing.Config()
    match signer:
        case KeySigner(private_key, password):
            # Declared as text, but handed on as it is to a function that takes bytes.
            secret = None if password is None else cast(str, password.encode())
            return config.use_elliptic_key_signer(private_key=private_key, password=secret)
        case CertificateSigner(private_key, certificate, chain):
            # An empty chain is not understood; a certificate that vouches for itself adds nothing.
            return config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=chain or (certificate,)
            )
        case SigstoreSigner(identity_token, staging):
            return config.use_sigstore_signer(
                identity_token=identity_token, use_ambient_credentials=identity_token is None, use_staging=staging
            )


def _verifying_config(model_signing: ModuleType, trust: Trust) -> "VerifyingConfig":
    config: VerifyingConfig = model_signing.verifying.Config()
    match trust:
        case PublicKey(file):
            return config.use_elliptic_key_verifier(public_key=file)
        case Roots(files):
            return config.use_certificate_verifier(certificate_chain=files)
        case Identity(name, provider, staging):
            return config.use_sigstore_verifier(identity=name, oidc_issuer=provider, use_staging=staging)


def _signatures_in(folder: Path, signature: Path) -> list[Path]:
    inside = inode_of(signature.parent) == inode_of(folder)
    return [Path(SIGNATURE_FILE), *([Path(signature.name)] if inside else [])]


def _load() -> ModuleType:
    try:
        import model_signing
        import model_signing.hashing
        import model_signing.signing
        import model_signing.verifying
    except ImportError as error:
        raise MissingExtraError(
            f"signatures need a package that is not installed ({error.name}). Run: pip install 'portllm[sign]'."
        ) from error
    return model_signing


@contextlib.contextmanager
def _translated(what: str, *, hint: str) -> Iterator[None]:
    try:
        yield
    except (OutputError, SignatureError):
        raise
    except Exception as error:  # keys, certificates and servers fail in the types of five libraries
        raise SignatureError(f"{what}: {_told(error)}. {hint}") from error


def _hint(means: Signer | Trust) -> str:
    if isinstance(means, SigstoreSigner | Identity):
        return "Sigstore needs the network; a key file does not."
    return "Pass PEM files, with keys on P-256, P-384 or P-521."


def _told(error: Exception) -> str:
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}"
