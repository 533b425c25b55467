"""Sign a patch or a merged model, after verifying it."""

from pathlib import Path

from portllm.errors import SignatureError
from portllm.patch.adapter_folder import PatchLike, folder_of
from portllm.patch.patch import Patch
from portllm.verifying.signature import SIGNATURE_FILE, Signer, require_key_files, sign_folder
from portllm.verifying.verify import verify


def sign(where: PatchLike, signer: Signer, *, signature: str | Path | None = None, overwrite: bool = False) -> Path:
    """Sign every file of a patch, or of a model written by `merge`.

    The signed statement holds the digest of each file. `patch.json` is among them, so the signature covers the identity
    of the base, how the patch was captured, and every port.

    Args:
        where: The folder, or a patch opened from there.
        signer: The key or identity to sign with.
        signature: The file to write, or None for `model.sig` in the folder.
        overwrite: Replace the signature if it exists.

    Returns:
        The signature's file.

    Raises:
        NotFoundError, PatchRecordError, CheckpointError: As `verify`.
        SignatureError: The folder does not verify, or the key or certificate cannot be used.
        OutputExistsError: The signature exists.
        OutputError: It cannot be written.
        MissingExtraError: The extra `sign` is not installed.
    """
    require_key_files(signer)
    where = folder_of(where) if isinstance(where, Patch) else where
    verification = verify(where)
    wrong = [check for check in verification.checks if not check.holds]
    if wrong:
        raise SignatureError(
            f"'{where}': does not verify, so it was not signed: {wrong[0].subject}: {wrong[0].finding}. 'portllm "
            f"verify {where}' shows all checks."
        )
    file = Path(where) / SIGNATURE_FILE if signature is None else Path(signature)
    sign_folder(Path(where), signer, signature=file, overwrite=overwrite)
    return file
