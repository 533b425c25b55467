"""Signatures with OpenSSF model-signing, which is imported only when a signature is made or checked.

A signature is a Sigstore bundle in one file. What it signs is a statement with the SHA-256 digest of every file of the
folder; `patch.json` is one of them, and with it the identity of the base and the chain of ports.

Source: the format, https://github.com/sigstore/model-transparency/blob/main/docs/model_signing_format.md.
"""

import base64
import contextlib
import io
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from portllm.errors import CheckpointError, MissingExtraError, OutputError, OutputExistsError, SignatureError
from portllm.files.input_file import read_input
from portllm.files.json_file import read_json
from portllm.files.json_text import parse_json
from portllm.files.own_files import inode_of, write_text
from portllm.installed import why_not

if TYPE_CHECKING:
    from model_signing.hashing import Config as HashingConfig
    from model_signing.signing import Config as SigningConfig
    from model_signing.verifying import Config as VerifyingConfig

SIGNATURE_FILE = "model.sig"
"""Its usual name, in the folder that it signs."""

CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
"""The elliptic curves of keys that sign, by the names of OpenSSL."""

MAX_KEY_BYTES = 1_000_000
"""Of a key or a file of certificates; a whole system's roots have a quarter of that."""

MAX_SIGNATURE_BYTES = 16_000_000
"""A statement has some hundred bytes for each file, so that this is a folder of forty thousand."""


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


def require_key_files(means: Signer | Trust) -> None:
    """Every key and certificate that is named is a file; what is in it is read when it is used.

    Raises:
        SignatureError: One is not there.
    """
    key, _, others = _files_of(means)
    for file in (*([] if key is None else [key]), *others):
        if not Path(file).is_file():
            raise SignatureError(f"'{file}': no such file. {_hint(means)}")


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
    signatures = _signatures_in(folder, signature)
    # Left alone, the library passes over .git, .github, .gitignore and .gitattributes, in which programs can lie, too.
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=signatures, ignore_git_paths=False)
    with _translated(f"'{folder}': could not be signed", hint=_hint(signer)):
        _require_keys(signer)
        config = _signing_config(model_signing, signer).set_hashing_config(hashing)
        with tempfile.TemporaryDirectory(prefix="portllm-sign-") as scratch:
            made = Path(scratch) / SIGNATURE_FILE
            config.sign(folder, made)
            if left_out := _uncovered(folder, _resources(_statement(made)), signatures):
                raise SignatureError(f"'{folder / left_out}': could not be read, so the folder was not signed.")
            try:
                write_text(signature, made.read_text(encoding="utf-8"))
            except OSError as error:
                raise OutputError(f"'{signature}': cannot be written: {error.strerror}.") from error


def signature_problem(folder: Path, trust: Trust, *, signature: Path | None, required: Collection[str]) -> str | None:
    """Why a folder does not bear the signature that it must, or None.

    A signature that leaves out a file of the folder is none, whatever its signer chose to ignore.

    Args:
        folder: What must be signed.
        trust: By whom.
        signature: The file of the signature, or None for the usual one.
        required: Files that it must cover, though they may not be there.

    Raises:
        SignatureError: The key or certificate cannot be read, or Sigstore cannot be reached.
        MissingExtraError: model-signing is not installed.
    """
    file = folder / SIGNATURE_FILE if signature is None else signature
    require_key_files(trust)
    model_signing = _load()
    with _translated(f"{trust}: cannot be checked against", hint=_hint(trust)):
        _require_keys(trust)
        config = _verifying_config(model_signing, trust)
    if not os.path.isfile(file):
        return f"there is no '{file}'"
    if (size := file.stat().st_size) > MAX_SIGNATURE_BYTES:
        return f"'{file}' has {size} bytes, the limit for a signature is {MAX_SIGNATURE_BYTES}"
    try:
        statement = _statement(file)
        resources = _resources(statement)
        config.set_hashing_config(_hashing_config(model_signing, statement))
        with contextlib.redirect_stdout(io.StringIO()):
            config.verify(folder, file)
        unsigned = min(set(required) - resources, default=None) or _uncovered(
            folder, resources, _signatures_in(folder, file)
        )
    except Exception as error:  # what a hostile signature makes the parsers and verifiers below raise has no bound
        return f"not by {trust}, or not over these files: {_told(error)}"
    return None if unsigned is None else f"does not cover '{unsigned}'"


def _is_signature(file: Path) -> bool:
    try:
        return "dsseEnvelope" in read_json(file)
    except CheckpointError:
        return False


def _require_keys(means: Signer | Trust) -> None:
    """Raise OSError if a key or certificate is no file: the libraries below would wait for it, or read without end.

    Raises:
        ValueError: It is a key of a kind that no signature is made with.
    """
    key, password, others = _files_of(means)
    for file in (*(() if key is None else (key,)), *others):
        if b"-----BEGIN" not in read_input(file, most=MAX_KEY_BYTES):
            raise SignatureError(f"'{file}': is no PEM file. {_hint(means)}")
    if key is not None:
        _require_curve(key, read_input(key, most=MAX_KEY_BYTES), password)


def _files_of(means: Signer | Trust) -> tuple[str | Path | None, str | None, tuple[str | Path, ...]]:
    """The file of a key, its password, and the files of certificates."""
    match means:
        case KeySigner(key, password):
            return key, password, ()
        case CertificateSigner(key, certificate, chain):
            return key, None, (certificate, *chain)
        case PublicKey(key):
            return key, None, ()
        case Roots(files):
            return None, None, files
        case _:
            return None, None, ()


def _require_curve(file: str | Path, pem: bytes, password: str | None) -> None:
    """Raise ValueError if a key is not on a curve that signatures are made with; what cannot be read passes."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    unread = (ValueError, TypeError, UnsupportedAlgorithm)
    key: Any = None
    with contextlib.suppress(*unread):
        key = load_pem_public_key(pem)
    with contextlib.suppress(*unread):
        key = key or load_pem_private_key(pem, None if password is None else password.encode())
    if key is None:
        return
    is_on_curve = isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey)
    kind = key.curve.name if is_on_curve else re.sub(r"^_|(Private|Public)Key$", "", type(key).__name__)
    if kind not in CURVES:
        raise ValueError(
            f"'{file}' is a key of kind {kind}, and signatures are made with {', '.join(CURVES.values())}. To make "
            "one: openssl ecparam -genkey -name prime256v1 -noout -out my.key; its public half: openssl ec -in my.key "
            "-pubout -out my.pub"
        )


def _statement(signature: Path) -> Mapping[str, Any]:
    """What a signature signs: which files, and how their digests were taken. It proves nothing by itself."""
    envelope: Any = parse_json(read_input(signature, most=MAX_SIGNATURE_BYTES))
    statement: Any = parse_json(base64.b64decode(envelope["dsseEnvelope"]["payload"]))
    predicate: Mapping[str, Any] = statement["predicate"]
    return predicate


def _resources(statement: Mapping[str, Any]) -> set[str]:
    """The files that a statement covers."""
    return {resource["name"] for resource in statement["resources"]}


def _hashing_config(model_signing: ModuleType, statement: Mapping[str, Any]) -> "HashingConfig":
    """How to take the digests of a folder as a statement says it was done, but over git's files too.

    What the signer chose to ignore, the library adds from the statement; `_uncovered` tells what of that is there.
    """
    how = statement["serialization"]
    config: HashingConfig = model_signing.hashing.Config()
    config.use_file_serialization(hashing_algorithm=how["hash_type"], allow_symlinks=how["allow_symlinks"])
    return config.set_ignored_paths(paths=(), ignore_git_paths=False)


def _uncovered(folder: Path, resources: Collection[str], signatures: Collection[Path]) -> str | None:
    """The first file of a folder, at any depth, that is not among those which a statement covers; None if none is.

    Raises:
        OSError: A folder in it cannot be listed, so that nobody knows what it holds.
    """

    def stop(error: OSError) -> NoReturn:
        raise error

    known = {*resources, *map(str, signatures)}
    for place, folders, files in os.walk(folder, onerror=stop):
        folders.sort()
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted((*files, *links)):
            path = (Path(place) / name).relative_to(folder).as_posix()
            if path not in known:
                return path
    return None


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
        raise MissingExtraError(f"signatures need OpenSSF model-signing; {why_not(error, 'sign')}") from error
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
    """In its own words; a mere type says more than words that are about the inside of a library."""
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error).rstrip(".")
    return f"{type(error).__name__}{f' ({error})' if str(error) else ''}"
